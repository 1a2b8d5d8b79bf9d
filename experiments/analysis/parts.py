"""What each analysis computes: numbers that go to JSON, from a model, its layers and minibatches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from eva_lightning.analysis import (
    RHOS,
    adapter_distances,
    adapter_matrices,
    collect_components,
    component_similarity,
    convergence_curve,
    rank_maps,
    similarity_matrix,
)
from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.streaming import compute_eva_state
from eva_lightning.tensor_files import read_tensors
from experiments.analysis.settings import BATCH_SIZES, Settings
from experiments.analysis.sources import Source, Streamed, order_of
from experiments.comparisons.held_out import quick_trainer
from experiments.runner.lightning_runs import Divergence

Numbers = dict[str, Any]

#: Methods of Tables 5 and 6: uniform ranks, so that both have matrices of one shape.
METHODS = (MethodKey.parse("lora"), MethodKey.parse("eva:1"))


def convergence(settings: Settings, streamed: Streamed) -> Numbers:
    """Figure 11: the same samples in minibatches of several sizes."""
    curves = {}
    for size in BATCH_SIZES:
        batches = streamed.batches(size, f"convergence, batch size {size}")
        curves[str(size)] = convergence_curve(
            streamed.model, batches, streamed.layers, settings.components, mask_fn=streamed.source.mask_fn
        )
    return {"curves": {size: [vars(point) for point in curve] for size, curve in curves.items()}}


def _components(settings: Settings, streamed: Streamed, size: int, what: str, order: list[int]) -> Any:
    batches = streamed.batches(size, what, order)
    mask_fn = streamed.source.mask_fn
    return collect_components(streamed.model, batches, streamed.layers, settings.components, mask_fn=mask_fn)


def batch_sizes(settings: Settings, streamed: Streamed) -> Numbers:
    """Figure 5, right."""
    order = list(range(settings.images))
    components = {
        size: _components(settings, streamed, size, f"components, batch size {size}", order) for size in BATCH_SIZES
    }
    return {"matrix": similarity_matrix(components).tolist()}


def batch_orders(settings: Settings, streamed: Streamed) -> Numbers:
    """Figure 12: half of the samples, so that an order can matter: not all there are."""
    runs = []
    for seed in range(settings.orders):
        order = order_of(settings.images, seed)[: settings.images // 2]
        runs.append(_components(settings, streamed, 4, f"components, order {seed + 1} of {settings.orders}", order))
    similarity = component_similarity(runs)
    return {"cosine": similarity.cosine.tolist(), "overlap": similarity.overlap.tolist()}


def ranks(settings: Settings, streamed: Streamed) -> Numbers:
    """Figures 13 and 14: one state with r * 3 components serves every rho."""
    k = round(settings.map_rank * max(RHOS))
    state = compute_eva_state(
        streamed.model, lambda: streamed.batches(16, "ranks"), streamed.layers, k, mask_fn=streamed.source.mask_fn
    )
    return {"ranks": {f"{rho:g}": found for rho, found in rank_maps(state, settings.map_rank).items()}}


#: Those that stream; ``distances`` trains.
STREAMING = {"convergence": convergence, "batch-sizes": batch_sizes, "batch-orders": batch_orders, "ranks": ranks}


class _Start(L.Callback):
    """The A matrices at the first training step."""

    def __init__(self) -> None:
        self.matrices: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.matrices = adapter_matrices(pl_module)


def train(settings: Any, source: Source, show: bool) -> tuple[dict[str, torch.Tensor], Numbers]:
    """One training of Tables 5 and 6: A matrices at the end, and how far they are from those at the first step.

    Args:
        settings: With ``method`` and ``seed``.
        source: What to train.
        show: Show Lightning's progress bar.
    """
    L.seed_everything(settings.seed, verbose=False)
    key, tuning, start, divergence = (
        MethodKey.parse(settings.method),
        source.tuning(settings.seed),
        _Start(),
        Divergence(),
    )
    options = AdapterOptions(rank=settings.r, rho=1.0, bias=tuning.bias, seed=settings.seed)
    mask_fn = source.mask_fn
    callbacks = apply_method(key.method, tuning.module, options, exclude=tuning.exclude or None, mask_fn=mask_fn)
    accelerator = "cpu" if settings.source == "digits" else settings.accelerator
    trainer = quick_trainer(settings.epochs, [*callbacks, start, divergence], show, accelerator)
    trainer.fit(tuning.module, tuning.data)
    last = adapter_matrices(tuning.module)
    moved = adapter_distances(start.matrices, last)
    return last, {"moved": {name: vars(d) for name, d in moved.items()}, **divergence.metrics(trainer, tuning.module)}


def between(files: Mapping[str, Any]) -> Numbers:
    """Table 5: distances between the final A matrices of two methods, from their files."""
    first, second = (read_tensors(file)[0] for file in files.values())
    return {name: vars(distance) for name, distance in adapter_distances(first, second).items()}
