"""Checkpoints to resume a run from, at the ends of epochs but not too often."""

from __future__ import annotations

import time
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class EpochCheckpoints(ModelCheckpoint):
    """Lightning's ``last.ckpt``, written at the end of an epoch `minutes` after the one before.

    A sweep of short runs then writes none, and loses no more than `minutes` and one epoch of a long run. (Lightning's
    own ``train_time_interval`` saves in the middle of epochs, where a run cannot be resumed exactly.)

    Args:
        folder: Where to.
        minutes: Least time between checkpoints, and before the first; 0 for one after every epoch.
    """

    def __init__(self, folder: str | Path, minutes: float = 0.0) -> None:
        super().__init__(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
        self.minutes = minutes
        self._saved = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write one if it is time; on all processes at once, whatever their clocks say."""
        due = time.monotonic() - self._saved >= 60.0 * self.minutes
        if trainer.strategy.broadcast(due):
            super().on_train_epoch_end(trainer, pl_module)
            self._saved = time.monotonic()
