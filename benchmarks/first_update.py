"""How large the first step of training is from each start, at equal rank: EVA-grad, EVA, LoRA-GA's directions, random.

python -m benchmarks starts --root DIR --task caltech101 --model dinov2_s14 --weights FILE --image-size 56
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks.harness import describe_machine
from eva_lightning.adapters import find_adapters
from eva_lightning.methods.gradient_eva import first_update_directions
from eva_lightning.methods.training_statistics import layer_statistics
from eva_lightning.streaming import compute_eva_state
from eva_lightning.streaming_options import StreamingOptions
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, option
from experiments.runner.tables import as_markdown
from experiments.vtab import settings as of_a_run
from experiments.vtab.run import assemble

Means = Mapping[str, Tensor]

MEASURES = ("first update", "held out", "mean gradient", "function change", "loss decrease")


@dataclass(frozen=True, kw_only=True)
class Settings(of_a_run.Settings):
    """A run of the VTAB command, of which only the start is looked at."""

    batches: int = option(
        7, "minibatches to choose directions by; as many others are held out", Role.RESULT, at_least=1
    )


def compare(settings: Settings) -> pd.DataFrame:
    """Print and return each start's measures, summed over layers, in percent of EVA-grad's.

    Per layer, with P the projection on A's rows, G_b the gradient of a minibatch and G their mean: ``mean ‖G_b P‖²``
    over the minibatches that chose A (first update) and over others (held out), ``‖G P‖²`` (mean gradient),
    ``mean ‖G_b P x‖²`` over minibatches and tokens (function change), and the decrease of the held-out loss to first
    order, ``<G', G P>`` with G' its gradient.
    """
    data, module, _ = assemble(replace(settings, method="lora"))
    data.setup("fit")
    minibatches = [batch for batch, _ in zip(data.train_dataloader(), range(2 * settings.batches), strict=False)]
    seen, held = minibatches[: settings.batches], minibatches[settings.batches :]
    layers = {name: layer.base for name, layer in find_adapters(module).items()}
    first = _means(module, seen, layers)
    other = _means(module, held, layers)
    options = StreamingOptions(tokens_per_sample=None, engine="exact", stopping="never")
    state = compute_eva_state(module, lambda: seen, layers, settings.rank, options)
    sums: dict[str, list[float]] = {}
    for index, name in enumerate(layers):
        for start, a in _starts(first[name], state.components[name], settings, index).items():
            values = _measure(a.double(), first[name], other[name])
            sums[start] = [x + y for x, y in zip(sums.get(start, [0.0] * len(values)), values, strict=True)]
    table = pd.DataFrame.from_dict(sums, orient="index", columns=list(MEASURES))
    table = (100 * table / table.loc["EVA-grad"]).rename_axis("start")
    processor = describe_machine(torch.device("cpu"))["processor"]
    print(
        f"{settings.task}, {settings.model}, rank {settings.rank}, seed {settings.seed}: {len(layers)} layers, "
        f"{len(seen)} minibatches of {settings.batch_size} images seen, {len(held)} held out; {processor}\n"
    )
    print(as_markdown(table, 1))
    return table


def _means(module: Any, batches: Sequence[Any], layers: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    sums = layer_statistics(module, batches, layers, ("gradient", "gradient_moment", "inputs"))
    return {name: {str(s): mean.total / mean.count for s, mean in of.items()} for name, of in sums.items()}


def _starts(means: Means, eva: Tensor, settings: Settings, index: int) -> dict[str, Tensor]:
    """Orthonormal rows for each start, shape ``(rank, in)``."""
    gradient, rank = means["gradient"], settings.rank
    values, vectors = torch.linalg.eigh(means["inputs"].double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    generator = torch.Generator().manual_seed(1000 * settings.seed + index)
    return {
        "EVA-grad": first_update_directions(gradient, means["gradient_moment"], 1, rank)[0],
        "EVA": eva[:rank],
        "LoRA-GA's directions": torch.linalg.svd(gradient, full_matrices=False).Vh[:rank],
        "top right vectors of G C^½": torch.linalg.svd(gradient.double() @ root, full_matrices=False).Vh[:rank],
        "random": torch.linalg.qr(torch.randn(gradient.shape[1], rank, generator=generator)).Q.T,
    }


def _measure(a: Tensor, seen: Means, held: Means) -> list[float]:
    """The measures of one layer, in the order of `MEASURES`."""
    update = a @ seen["gradient_moment"].double() @ a.T
    mean, other = a @ seen["gradient"].double().T, a @ held["gradient"].double().T
    values = (
        update.trace(),
        (a @ held["gradient_moment"].double() @ a.T).trace(),
        mean.square().sum(),
        (update @ (a @ seen["inputs"].double() @ a.T)).trace(),
        (mean * other).sum(),
    )
    return [float(value) for value in values]


COMMAND = SettingsCommand(
    Settings, "python -m benchmarks starts", (__doc__ or "").splitlines()[0], "benchmarks.first_update:compare"
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
