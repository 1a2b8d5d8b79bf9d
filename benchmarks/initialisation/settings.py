"""Settings of ``python -m benchmarks init`` and what they share with ``resize``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import BenchmarkSettings
from eva_lightning.errors import InputError
from eva_lightning.streaming_options import ENGINES, STOPPING_RULES
from experiments.runner.settings import Role, check_settings, option

SIZES = {size: f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")}
ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # Lightning's
PRECISIONS = (*ALIASES, "32-true", "bf16-true", "bf16-mixed", "16-mixed")
_MODELS = f"timm names, or dinov2_s14 ... dinov2_g14; {', '.join(SIZES)} stand for vit_..._patch16_224"


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BenchmarkSettings):
    """Which models to measure, and where."""

    models: tuple[str, ...] = option(("small",), _MODELS, Role.RESULT)
    r: int = option(16, "mean rank per layer", Role.RESULT, at_least=1)
    rho: float = option(2.0, "largest rank over mean rank", Role.RESULT, at_least=1)
    image_size: int = option(224, "in pixels", Role.RESULT, at_least=1)
    precision: str = option("32-true", "the Trainer's", Role.RESULT, choices=PRECISIONS)
    device: str = option("auto", "what to measure on", Role.PLACE, choices=("auto", "cpu", "cuda"))
    repeats: int = option(3, "timed runs of each", Role.RESULT, at_least=1)
    seed: int = option(0, "of weights, images and components", Role.RESULT)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def model_names(self) -> list[str]:
        """timm's names."""
        return [SIZES.get(name, name) for name in self.models]

    @property
    def full_precision(self) -> str:
        """The precision by Lightning's long name."""
        return ALIASES.get(self.precision, self.precision)

    def torch_device(self) -> torch.device:
        """The device asked for.

        Raises:
            InputError: There is none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device cuda: torch finds no CUDA device here; use cpu", setting="device")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, kw_only=True)
class Settings(ModelSettings):
    """What to compare, on which images."""

    models: tuple[str, ...] = option(("dinov2_s14",), _MODELS, Role.RESULT)
    batches: int = option(16, "most minibatches of ours", Role.RESULT, at_least=1)
    peft_batches: int | None = option(
        None, "most minibatches of PEFT; 0: without PEFT; as --batches if not given", Role.RESULT, at_least=0
    )
    heldout_batches: int = option(4, "for held-out variance; 0: none", Role.RESULT, at_least=0)
    batch_size: int = option(16, "images per minibatch", Role.RESULT, at_least=1)
    engine: tuple[str, ...] = option(
        (), "engines to compare; the callback's if not given", Role.RESULT, choices=ENGINES
    )
    stopping: str | None = option(
        None, "stopping rule; the callback's if not given", Role.RESULT, choices=STOPPING_RULES
    )
    tokens_per_sample: str | None = option(None, "a number or 'all'; the callback's if not given", Role.RESULT)
    tau: float = option(0.99, "convergence threshold of both", Role.RESULT, above=0, at_most=1)
    images: str | None = option(None, "folder with image files; 1/f noise if not given", Role.PLACE)
    weights: str | None = option(
        None, "weight file; if not given real ones of dinov2_s14, random ones of other models", Role.PLACE
    )
    peft_repeats: int = option(1, "timed runs of PEFT", Role.RESULT, at_least=1)
    no_reference: bool = option(False, "skip the exact SVD and captured variances", Role.SELECTION)
    no_memory: bool = option(False, "skip the peak memory", Role.SELECTION)
    profile: bool = option(False, "also list where our time goes, from one more run", Role.SELECTION)

    def __post_init__(self) -> None:
        super().__post_init__()
        tokens = self.tokens_per_sample
        if tokens not in (None, "all") and not (str(tokens).isdigit() and int(str(tokens)) > 0):
            raise InputError(
                f"tokens_per_sample must be a positive number or 'all', got {tokens!r}", setting="tokens_per_sample"
            )

    @property
    def most_peft_batches(self) -> int:
        """Cap on PEFT's minibatches."""
        return self.batches if self.peft_batches is None else self.peft_batches

    @property
    def streamed(self) -> int:
        """Distinct minibatches to stream."""
        return max(self.batches, min(self.most_peft_batches, 64))

    def callbacks(self) -> dict[str, dict[str, Any]]:
        """Engine -> streaming options that were given; what was not is left to their defaults."""
        given: dict[str, Any] = {"tau": self.tau}
        if self.stopping is not None:
            given["stopping"] = self.stopping
        if self.tokens_per_sample is not None:
            given["tokens_per_sample"] = None if self.tokens_per_sample == "all" else int(self.tokens_per_sample)
        return {engine: {**given, "engine": engine} for engine in self.engine} or {"default": given}
