"""What changing ranks costs once the decomposition is known: ranks, adapter resize, optimizer rebuild."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.rank_plan import apply_plan, make_plan
from eva_lightning.state import EVAState
from eva_lightning.trainer_state import rebuild_optimizers
from experiments.benchmark_init import Runner, Stopwatch, Timing, profile_ours
from experiments.benchmark_reference import summarise

if TYPE_CHECKING:
    from experiments.benchmark import Steps

PARTS = ("ranks and A", "resize adapters", "rebuild optimizers")


def synthetic_state(widths: Mapping[str, int], k: int, seed: int = 0) -> EVAState:
    """A state as streaming would leave it: random orthonormal components, power-law spectra that differ by layer."""
    generator = torch.Generator().manual_seed(seed)
    state = EVAState(n_batches=1)
    for name, width in widths.items():
        kept = min(k, width)
        state.components[name] = torch.linalg.qr(torch.randn(width, kept, generator=generator)).Q.T.contiguous()
        power = 0.4 + 1.2 * float(torch.rand((), generator=generator))
        eigenvalues = torch.arange(1, width + 1, dtype=torch.float64) ** (-2 * power) * 1000
        total = float(eigenvalues.sum())
        state.singular_values[name] = eigenvalues[:kept].sqrt().float()
        state.explained_variance_ratio[name] = (eigenvalues[:kept] / total).float()
        state.total_variance[name] = total
        state.n_samples[name] = 1000
        state.converged[name] = True
    state.widths = dict(widths)
    return state


@dataclass
class ResizeTimer(pl.Callback):
    """Does after the streaming what :class:`~eva_lightning.EVAInitCallback` does, and times each part."""

    r: int
    rho: float
    seed: int = 0

    def __post_init__(self) -> None:
        self.timings: dict[str, Timing] = {}
        self.ranks: dict[str, int] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the LoRA layers."""
        inject(pl_module, r=self.r, alpha=1.0)
        widths = {name: layer.in_features for name, layer in find_adapters(pl_module).items()}
        self._state = synthetic_state(widths, round(self.r * self.rho), self.seed)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks and A, then the adapters, then the optimizers."""
        layers = find_adapters(pl_module)
        device = trainer.strategy.root_device
        plan = self._timed(device, PARTS[0], lambda: make_plan(layers, self._state, self.rho, "ratio", "eva"))
        self._timed(device, PARTS[1], lambda: apply_plan(pl_module, layers, plan, injected=True))
        self._timed(device, PARTS[2], lambda: rebuild_optimizers(trainer, pl_module))
        self.ranks = plan.state.ranks

    def _timed(self, device: torch.device, part: str, run: Callable[[], Any]) -> Any:
        watch = Stopwatch(device)
        value = run()
        self.timings[part] = watch.read()
        return value


def build_empty(model: str, image_size: int, precision: str) -> pl.LightningModule:
    """A classifier whose weights are allocated and never written: their values do not matter here.

    Raises:
        InputError: Unknown model or unsuitable image size.
    """
    from eva_lightning.vision.module import ImageClassifier

    with torch.device("meta"):
        classifier = ImageClassifier(model, 102, image_size)
    if precision == "bf16-true":
        classifier.to(torch.bfloat16)
    classifier.model.to_empty(device="cpu")
    for module in classifier.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]
    return _with_fresh_metrics(classifier)


def _with_fresh_metrics(classifier: Any) -> Any:
    from torchmetrics.classification import MulticlassAccuracy

    for name in ("train_accuracy", "val_accuracy", "test_accuracy"):
        setattr(classifier, name, MulticlassAccuracy(102, average="micro"))
    return classifier


def measure_resize(name: str, device: torch.device, options: argparse.Namespace, steps: Steps) -> dict[str, Any]:
    """Time the parts on fresh copies of one model, `options.repeats` times after a warm-up."""
    steps.total(options.repeats + 3)
    steps.begin("building the model")
    classifier = build_empty(name, options.image_size, options.precision)
    blank = torch.zeros(1, 3, options.image_size, options.image_size)
    runner = Runner(classifier, [(blank, torch.zeros(1, dtype=torch.long))], device, options.precision)
    timers: list[ResizeTimer] = []

    def run() -> None:
        timers.append(ResizeTimer(options.r, options.rho, options.seed))
        runner._fit(_copy(classifier), timers[-1])

    for repeat in range(-1, options.repeats):
        steps.begin("warming up" if repeat < 0 else f"run {repeat + 1}")
        run()
    timed = timers[1:]
    steps.begin("profile")
    profile = profile_ours(run, top=15)
    ranks = timed[0].ranks
    parts = {
        part: {
            "wall": [timer.timings[part].wall for timer in timed],
            "cpu": [timer.timings[part].cpu for timer in timed],
        }
        for part in PARTS
    }
    totals = [sum(timer.timings[part].wall for part in PARTS) for timer in timed]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "layers": len(ranks),
        "changed": sum(rank != options.r for rank in ranks.values()),
        "removed": sum(rank == 0 for rank in ranks.values()),
        "parts": parts,
        "seconds": summarise(totals),
        "wall": totals,
        "profile": profile,
    }


def _copy(classifier: nn.Module) -> Any:
    """A copy with modules of its own that shares the frozen weights: they are not written, and may be gigabytes."""
    shared = {id(p): p for p in classifier.parameters()}
    return copy.deepcopy(classifier, dict(shared))


def print_resize(document: Mapping[str, Any], console: Console) -> None:
    """The table of ``resize``."""
    table = Table(title="seconds after the streaming: median (min-max)", title_justify="left")
    for heading in ("model", "parameters", "adapted layers", "changed", "removed", *PARTS, "total"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for result in document["models"]:
        parts = [_spread(summarise(result["parts"][part]["wall"])) for part in PARTS]
        counts = [str(result[key]) for key in ("layers", "changed", "removed")]
        table.add_row(
            result["model"], f"{result['parameters'] / 1e6:,.0f} M", *counts, *parts, _spread(result["seconds"])
        )
    console.print(table)
    for result in document["models"]:
        profile = Table(title=f"profile of {result['model']}, set-up included", title_justify="left")
        for heading in ("function", "where", "calls", "own s", "cumulative s"):
            profile.add_column(heading)
        for row in result["profile"]:
            numbers = f"{row['calls']}", f"{row['own']:.3f}", f"{row['cumulative']:.3f}"
            profile.add_row(row["function"], row["where"], *numbers)
        console.print(profile)


def _spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f}-{values['max']:.3f})"
