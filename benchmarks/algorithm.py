"""The paper's algorithm beside the default and PEFT: minibatches, seconds, held-out variance and ranks on one stream.

    python -m benchmarks algorithm --weights FILE --root data/vtab-1k --task caltech101 --image-size 112

All three see the 800 training images of the task in the same minibatches, started over where they ask for more. What is
compared is what training starts from: of each layer the components that get a rank. How much of the variance of val200,
which none of them saw, they capture, over the best that many directions could, is measured by dense eigenvalues.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from benchmarks.harness import describe_machine, publish, say, table_of
from benchmarks.initialisation import peft_eva
from benchmarks.initialisation.runner import Batch, Outcome, Runner
from benchmarks.initialisation.settings import ModelSettings
from benchmarks.initialisation.variance import heldout_variance
from benchmarks.models import build_classifier
from benchmarks.photographs import make_images
from eva_lightning.adapters.targets import find_targets
from eva_lightning.vision.data.datamodule import VTAB1K
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, option

PAPER, PEFT = "algorithm='paper'", "PEFT"


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """What to compare, on which images."""

    weights: str | None = option(None, "weight file; random weights with decaying spectra if not given", Role.PLACE)
    root: str | None = option(None, "folder that holds the VTAB-1K task folders; 1/f noise if not given", Role.PLACE)
    task: str = option("caltech101", "task", Role.RESULT)
    images: int = option(800, "training images; of the task the first so many", Role.RESULT, at_least=1, at_most=800)
    batch_size: int = option(32, "images per minibatch", Role.RESULT, at_least=1)
    heldout: int = option(200, "images for held-out variance", Role.RESULT, at_least=1, at_most=200)
    tau: float = option(0.99, "convergence threshold of all", Role.RESULT, above=0, at_most=1)
    max_batches: int = option(400, "most minibatches of the paper's algorithm and of PEFT", Role.RESULT, at_least=1)
    no_peft: bool = option(False, "without PEFT, which takes longest", Role.SELECTION)
    cache: str | None = option(None, "folder for decoded images", Role.PLACE)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure all models; returns the JSON document."""
    before = describe_machine(settings.torch_device())
    train, heldout, source = _images(settings)
    models = [_measure(name, settings, train, heldout) for name in settings.model_names]
    return publish(
        {"images": source, "models": models}, before, settings, lambda console: _print(models, source, console)
    )


def _images(settings: Settings) -> tuple[list[Batch], list[Batch], str]:
    size, per = settings.image_size, settings.batch_size
    if settings.root is None:
        train, heldout = -(-settings.images // per), -(-settings.heldout // per)
        noise = make_images(None, train + heldout, per, size, settings.seed)
        return noise.batches[:train], noise.batches[train:], noise.source
    data = VTAB1K(
        settings.root, settings.task, split="train800", image_size=size, batch_size=per, eval_batch_size=per,
        cache_dir=settings.cache, limit_train=settings.images, limit_test=settings.heldout, seed=settings.seed,
    )  # fmt: skip
    data.setup("fit")
    heldout_batches = list(data.val_dataloader())
    return list(data.train_dataloader()), heldout_batches, f"{settings.images} images of {settings.task}, train800"


def _measure(name: str, settings: Settings, train: Sequence[Batch], heldout: Sequence[Batch]) -> dict[str, Any]:
    classifier = build_classifier(name, settings.image_size, settings.weights, settings.seed)
    targets, _ = find_targets(classifier, None, None, "auto")
    runner = Runner(
        classifier, train, settings.torch_device(), settings.full_precision, settings.r, settings.rho
    )  # fmt: skip
    cap, tau = settings.max_batches, settings.tau
    runs = {
        "default": lambda: runner.ours(tau=tau),
        PAPER: lambda: runner.ours(algorithm="paper", tau=tau, max_batches=cap),
    }
    if not settings.no_peft:
        runs[PEFT] = lambda: peft_eva.initialise(runner, cap, targets, tau)
    runner.forward(1)
    outcomes: dict[str, Outcome] = {}
    for method, run in runs.items():
        say(f"{name}: {method}")
        outcomes[method] = run()
        say(f"{name}: {method} took {outcomes[method].n_batches} minibatches, {outcomes[method].timing.wall:.0f} s")
    say(f"{name}: held-out variance")
    chosen = {method: _with_a_rank(outcome) for method, outcome in outcomes.items()}
    captured = heldout_variance(runner, targets, chosen, heldout)
    rows = [_row(method, outcome, outcomes[PAPER], captured[method]) for method, outcome in outcomes.items()]
    return {"model": name, "layers": len(targets), "minibatches_per_pass": len(train), "methods": rows}


def _with_a_rank(outcome: Outcome) -> dict[str, Tensor]:
    return {layer: outcome.components[layer][:rank] for layer, rank in outcome.ranks.items() if rank}


def _row(method: str, outcome: Outcome, paper: Outcome, captured: Mapping[str, float]) -> dict[str, Any]:
    ranks = list(outcome.ranks.values())
    return {
        "name": method,
        "n_batches": outcome.n_batches,
        "stopped_by_itself": outcome.stopped,
        "seconds": outcome.timing.wall,
        "cpu_seconds": outcome.timing.cpu,
        "heldout": {"median": statistics.median(captured.values()), "min": min(captured.values())},
        "heldout_per_layer": dict(captured),
        "ranks": dict(outcome.ranks),
        "rank_range": [min(ranks), statistics.median(ranks), max(ranks)],
        "moved_from_paper": sum(abs(rank - paper.ranks[layer]) for layer, rank in outcome.ranks.items()) / 2,
    }


def _print(models: Sequence[Mapping[str, Any]], source: str, console: Console) -> None:
    rows = [
        {
            "model": model["model"],
            "method": row["name"],
            "minibatches": f"{row['n_batches']}{'' if row['stopped_by_itself'] else ' (cap)'}",
            "seconds": f"{row['seconds']:.1f}",
            "CPU seconds": f"{row['cpu_seconds']:.1f}",
            "held out, median / min": f"{row['heldout']['median']:.4f} / {row['heldout']['min']:.4f}",
            "ranks min / median / max": " / ".join(f"{rank:g}" for rank in row["rank_range"]),
            "ranks elsewhere": f"{row['moved_from_paper']:g} of {sum(row['ranks'].values())}",
        }
        for model in models
        for row in model["methods"]
    ]
    console.print(table_of(rows, f"One stream: {source}, {models[0]['minibatches_per_pass']} minibatches a pass"))
    console.print("Ranks elsewhere: ranks that are in other layers than by algorithm='paper'.", highlight=False)


COMMAND = SettingsCommand(
    Settings,
    "python -m benchmarks algorithm",
    "The paper's algorithm beside the default and PEFT on the same minibatches.",
    "benchmarks.algorithm:measure",
)
main, command_line = COMMAND.main, COMMAND.command_line
