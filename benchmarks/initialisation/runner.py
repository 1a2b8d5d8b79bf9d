"""One initialisation at a time, as a user runs it: the plain forward, and our callback in a real Trainer."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.clock import Stopwatch, Timing
from benchmarks.harness import bare_trainer, quiet
from eva_lightning.batch_forward import run_forward
from eva_lightning.callback import EVAInitCallback
from eva_lightning.side_effects import observing
from eva_lightning.streaming_options import StreamingOptions
from eva_lightning.training_batches import set_up_loader, training_batches

Batch = tuple[Tensor, Tensor]


@dataclass
class Outcome:
    """What one initialisation gave.

    Attributes:
        timing: the initialisation alone; LoRA layers are made before it, for us and for PEFT alike.
        n_batches: minibatches that went into the decompositions.
        n_forwards: minibatches that went through the model (PEFT looks at one more).
        stopped: whether it stopped by itself, not at the cap.
        components: per layer, up to round(r * rho) rows.
        ranks: per layer, after the redistribution.
        fingerprint: a checksum of the ranks and of every A.
        streaming_seconds: the part of the wall time that :class:`~eva_lightning.EVAState` reports.
    """

    timing: Timing
    n_batches: int
    n_forwards: int
    stopped: bool
    components: dict[str, Tensor] = field(repr=False)
    ranks: dict[str, int] = field(repr=False)
    fingerprint: str
    streaming_seconds: float | None = None


@dataclass(frozen=True)
class Runner:
    """Runs initialisations of copies of one classifier on one list of minibatches.

    Args:
        classifier: LightningModule without adapters; never changed.
        batches: minibatches in memory, already collated.
        device: "cpu" or "cuda".
        precision: of the Trainer.
        r, rho: as for the callback.
    """

    classifier: pl.LightningModule
    batches: Sequence[Batch]
    device: torch.device
    precision: str = "32-true"
    r: int = 16
    rho: float = 2.0

    def forward(self, n_batches: int) -> list[Timing]:
        """The plain forward of the first minibatches, on the trainer's path; element i: time of the first i + 1."""
        timings: list[Timing] = []

        class Forward(pl.Callback):
            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                watch = Stopwatch(trainer.strategy.root_device)
                set_up_loader(trainer)
                with observing(pl_module), torch.no_grad():
                    for batch in training_batches(trainer, n_batches):
                        with trainer.precision_plugin.forward_context():
                            run_forward(pl_module, batch)
                        timings.append(watch.read())

        self.fit(copy.deepcopy(self.classifier), Forward())
        return timings

    def ours(self, **options: Any) -> Outcome:
        """Our callback's whole ``on_fit_start``: streaming with hooks, SVD, ranks, resize, optimizer rebuild.

        Args:
            options: of :class:`~eva_lightning.StreamingOptions`.
        """
        timings: list[Timing] = []

        class Timed(EVAInitCallback):
            def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                watch = Stopwatch(trainer.strategy.root_device)
                super().on_fit_start(trainer, pl_module)
                timings.append(watch.read())

        callback = Timed(self.rho, self.r, streaming=StreamingOptions(**options), verbose=False)
        module = self.copy()
        self.fit(module, callback)
        state = callback.state
        assert state is not None
        return Outcome(
            timings[0],
            state.n_batches,
            state.n_batches,
            all(state.converged.values()),
            dict(state.components),
            dict(state.ranks),
            fingerprint(module, state.ranks),
            state.seconds,
        )

    def copy(self) -> pl.LightningModule:
        """A copy with modules of its own that shares the frozen weights: they are not written, and may be gigabytes."""
        shared = {id(p): p for p in self.classifier.parameters()}
        return copy.deepcopy(self.classifier, dict(shared))

    def bare_copy(self) -> tuple[pl.LightningModule, torch.dtype]:
        """A copy of the classifier on the device, in the precision of its weights, and that precision."""
        classifier = copy.deepcopy(self.classifier).to(self.device)
        if self.precision == "bf16-true":
            classifier.to(torch.bfloat16)
        return classifier, next(classifier.parameters()).dtype

    def fit(self, module: pl.LightningModule, callback: pl.Callback) -> None:
        """Everything up to the first training step, with `callback`."""
        with quiet():
            trainer = bare_trainer(
                accelerator="gpu" if self.device.type == "cuda" else "cpu",
                precision=self.precision,
                max_epochs=1,
                callbacks=[callback, _StopBeforeTraining()],
            )
            try:
                trainer.fit(module, DataLoader(self.batches, batch_size=None))  # type: ignore[arg-type]
            except SystemExit:
                if trainer.interrupted:  # how Lightning ends on Ctrl-C
                    raise KeyboardInterrupt from None
                raise


class _StopBeforeTraining(pl.Callback):
    """Everything up to the first training step, and no step."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = True  # before fit() it would be reset

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        raise RuntimeError("the benchmark must not train: this version of Lightning ignores should_stop")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """What the Trainer runs forward passes in."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast(device.type, dtypes[precision]) if precision in dtypes else contextlib.nullcontext()


def fingerprint(module: nn.Module, ranks: Mapping[str, int]) -> str:
    """A checksum of the ranks and of every A."""
    digest = hashlib.sha256(repr(sorted(ranks.items())).encode())
    for name, parameter in module.named_parameters():
        if "lora_A" in name:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
