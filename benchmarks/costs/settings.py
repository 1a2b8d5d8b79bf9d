"""Settings of ``python -m benchmarks costs``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from benchmarks.harness import BenchmarkSettings
from eva_lightning.errors import InputError
from eva_lightning.methods.registry import METHODS, Half, MethodKey
from experiments.analysis import settings as of_analysis
from experiments.runner.settings import Role, check_settings, option

#: Optimizer steps of the paper's trainings: 30 epochs of 1,000 images in batches of 64 (section D.2), 100K (E.2).
TRAINING_STEPS = {"digits": 480, "vision": 480, "robots": 100_000}


def preparing(half: Half) -> tuple[str, ...]:
    """LoRA, for comparison, and every adapter method that computes something before training, by the registry."""
    chosen = [m for m in METHODS.values() if m.adapts and (m.needs != "nothing" or m.changes_base) and half in m.halves]
    return ("lora", *(method.name for method in chosen))


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings, of_analysis.ModelAndData):
    """Which model and data, which methods, how often."""

    methods: tuple[str, ...] = option(
        ("all",), "methods; all: every one that prepares something, and LoRA for comparison", Role.SELECTION
    )
    images: int = option(448, "training images, or windows per epoch", Role.RESULT, at_least=32)
    rank: int = option(16, "LoRA rank", Role.RESULT, at_least=1)
    batch_size: int = option(16, "images or windows per minibatch", Role.RESULT, at_least=1)
    max_batches: int | None = option(None, "most minibatches to read; the methods' own if not given", Role.RESULT)
    repeats: int = option(3, "measurements of each, in one process, after one that warms up", Role.RESULT, at_least=1)
    steps: int = option(5, "training steps to time", Role.RESULT, at_least=2)
    training_steps: int | None = option(
        None, "steps of the training that shares refer to; the paper's (480; 100,000 for RL) if not given",
        Role.SELECTION, at_least=1,
    )  # fmt: skip
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu or gpu", Role.RESULT)
    output: str = option("runs/costs", "folder for measurements and figure", Role.PLACE)
    overwrite: bool = option(False, "measure again; else what is measured already is reused", Role.PLACE)

    def __post_init__(self) -> None:
        check_settings(self)
        _ = self.analysis, self.keys

    @cached_property
    def analysis(self) -> of_analysis.Settings:
        """As the analyses have their model and data."""
        names = {item.name for item in fields(of_analysis.Settings)} - {"overwrite"}
        shared = {item.name: getattr(self, item.name) for item in fields(self) if item.name in names}
        return of_analysis.Settings(**shared, progress=False)

    @cached_property
    def keys(self) -> tuple[MethodKey, ...]:
        """The methods, each once."""
        half: Half = "rl" if self.checkpoint is not None else "vision"
        names = [name for word in self.methods for name in (preparing(half) if word == "all" else (word,))]
        keys = tuple(dict.fromkeys(MethodKey.parse(name) for name in names))
        for key in keys:
            if not key.adapts or half not in key.entry.halves:
                raise InputError(f"methods must have adapters and belong to this model, got {key}", setting="methods")
        if not keys:
            raise InputError("methods must name at least one method", setting="methods")
        return keys

    @property
    def whole(self) -> int:
        """Steps of the training that shares refer to."""
        return self.training_steps or TRAINING_STEPS[self.analysis.source]


@dataclass(frozen=True, kw_only=True)
class OneMethod(Settings):
    """The measurement of one method: what its run folder tells apart."""

    method: str = option("lora", "method with its rho", Role.RESULT)
