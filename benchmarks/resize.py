"""What changing ranks costs once the decomposition is known: ranks, adapter resize, optimizer rebuild.

python -m benchmarks resize --models vit_giant_patch14_dinov2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from benchmarks.clock import Stopwatch, Timing
from benchmarks.harness import INTERVAL, Figure, describe_machine, publish, say, table_of
from benchmarks.initialisation.runner import Runner
from benchmarks.initialisation.settings import ModelSettings
from benchmarks.models import build_empty
from eva_lightning.adapters import find_adapters, inject
from eva_lightning.rank_plan import apply_plan, make_plan
from eva_lightning.state import EVAState
from eva_lightning.trainer_state import rebuild_optimizers
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, option

PARTS = ("ranks and A", "resize adapters", "rebuild optimizers")


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """Which models to resize."""

    models: tuple[str, ...] = option(
        ("vit_giant_patch14_dinov2",), "timm names, or dinov2_s14 ... dinov2_g14", Role.RESULT
    )


def resize(settings: Settings) -> dict[str, Any]:
    """Measure all models; returns the JSON document."""
    before = describe_machine(settings.torch_device())
    models = [measure(name, settings) for name in settings.model_names]
    return publish({"models": models}, before, settings, lambda console: _print(models, console))


COMMAND = SettingsCommand(
    Settings,
    "python -m benchmarks resize",
    "Ranks, adapter resize and optimizer rebuild alone.",
    "benchmarks.resize:resize",
)
main, command_line = COMMAND.main, COMMAND.command_line


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Time the parts on fresh copies of one model, `settings.repeats` times after a warm-up."""
    say(f"{name}: building the model")
    size, precision = settings.image_size, settings.full_precision
    classifier = build_empty(name, size, precision)
    blank = (torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.long))
    runner = Runner(classifier, [blank], settings.torch_device(), precision)
    timers: list[ResizeTimer] = []
    for _ in range(settings.repeats + 1):
        say(f"{name}: resizing")
        timers.append(ResizeTimer(settings.r, settings.rho, settings.seed))
        runner.fit(runner.copy(), timers[-1])
    timed = timers[1:]
    ranks = timed[0].ranks
    total = [sum(timer.timings[part].wall for part in PARTS) for timer in timed]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "layers": len(ranks),
        "changed": sum(rank != settings.r for rank in ranks.values()),
        "removed": sum(rank == 0 for rank in ranks.values()),
        "parts": {
            part: {
                "wall": [timer.timings[part].wall for timer in timed],
                "cpu": [timer.timings[part].cpu for timer in timed],
            }
            for part in PARTS
        },
        "seconds": Figure.of(total).document(),
    }


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


def _print(models: Sequence[Mapping[str, Any]], console: Console) -> None:
    rows = [
        {
            "model": model["model"],
            "parameters": f"{model['parameters'] / 1e6:,.0f} M",
            "adapted layers": str(model["layers"]),
            "changed": str(model["changed"]),
            "removed": str(model["removed"]),
            **{part: Figure.of(model["parts"][part]["wall"]).text(".3f") for part in PARTS},
            "total": Figure.of(model["seconds"]["values"]).text(".3f"),
        }
        for model in models
    ]
    console.print(table_of(rows, "seconds after the streaming: median"))
    console.print(INTERVAL, highlight=False)
