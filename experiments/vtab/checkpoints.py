"""Checkpoints to resume a run from, at the ends of epochs but not too often."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


class EpochCheckpoints(Checkpoint):
    """Keep the last checkpoint of a run, written at the end of an epoch `minutes` after the one before.

    A sweep of short runs then writes none, and loses no more than `minutes` and one epoch of a long run. Only ends of
    epochs can be resumed from exactly. The file appears whole or not at all.

    Args:
        file: Where to; the folder is made when it is needed.
        minutes: Least time between checkpoints, and before the first; 0 for one after every epoch.
    """

    def __init__(self, file: str | Path, minutes: float = 0.0) -> None:
        self.file = Path(file)
        self.minutes = minutes
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write one if it is time; on all processes at once, whatever their clocks say."""
        due = time.monotonic() - self._last >= 60.0 * self.minutes
        if not trainer.strategy.broadcast(due) or trainer.sanity_checking:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f"{self.file.name}.part")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(self.file)
        self._last = time.monotonic()
