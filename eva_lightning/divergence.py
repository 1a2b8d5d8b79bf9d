"""Runs that diverged, noticed without making a step wait for the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from eva_lightning.callback_base import Callback
from eva_lightning.errors import EVAWarning
from eva_lightning.output import warn


class DivergenceWarning(EVAWarning):
    """The loss or a trained parameter is NaN or infinite."""


class DivergenceCallback(Callback):
    """Warns once when the loss is NaN or infinite, or, after an epoch, a parameter that trains.

    On a GPU the loss is copied while training goes on, and read a step or two later; parameters are looked at once an
    epoch.

    Attributes:
        diverged: What was said, or ``None`` as long as there was nothing to say.
    """

    def __init__(self) -> None:
        self.diverged: str | None = None
        self._reading: _Reading | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew."""
        self.diverged = self._reading = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss."""
        self.look_at_loss(trainer, outputs)

    def look_at_loss(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Read the last loss that has arrived, or send for the one in ``outputs``."""
        if self.diverged is not None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._reading is None and isinstance(loss, Tensor):
            self._reading = _Reading(loss, f"step {trainer.global_step}")
        if self._reading is not None and self._reading.has_arrived():
            self._read()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the parameters."""
        if self._reading is not None:
            self._read()
        if self.diverged is None and (names := _not_finite(pl_module)):
            self._say(
                f"{names[0]!r} has NaN or infinite values after epoch {trainer.current_epoch} ({len(names)} such)"
            )

    def _read(self) -> None:
        assert self._reading is not None
        reading, self._reading = self._reading, None
        value = reading.value()
        if value is not None:
            self._say(f"the loss is {value} at {reading.when}")

    def _say(self, what: str) -> None:
        self.diverged = (
            f"training has diverged: {what}. Lower the learning rate, clip gradients (gradient_clip_val) or train in "
            "higher precision, and check the data"
        )
        warn(self.diverged, DivergenceWarning)


class _Reading:
    """A loss on its way to the CPU."""

    def __init__(self, loss: Tensor, when: str) -> None:
        self.when = when
        loss = loss.detach()
        self._values = loss.to("cpu", non_blocking=True)
        self._event: Any = None
        if loss.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(loss.device))

    def has_arrived(self) -> bool:
        return self._event is None or bool(self._event.query())

    def value(self) -> float | None:
        """The first value that is NaN or infinite, if there is one; waits until it is there."""
        if self._event is not None:
            self._event.synchronize()
        values = self._values.float().reshape(-1)
        bad = values[~torch.isfinite(values)]
        return float(bad[0]) if len(bad) else None


def _not_finite(module: torch.nn.Module) -> list[str]:
    """Names of parameters that train and are not finite."""
    finite = {
        name: torch.isfinite(getattr(p, "to_local", lambda p=p: p)().detach()).all()
        for name, p in module.named_parameters()
        if p.requires_grad and p.device.type != "meta"
    }
    if not finite:
        return []
    device = next(iter(finite.values())).device
    flags = torch.stack([flag.to(device) for flag in finite.values()]).tolist()
    return [name for name, flag in zip(finite, flags, strict=True) if not flag]
