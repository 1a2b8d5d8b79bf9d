"""Callbacks of fine-tuning: the validation loss after given numbers of updates, and where a checkpoint is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch

from eva_lightning.side_effects import isolated_rng, observing


class ValidationLosses(L.Callback):
    """Note the loss on the held-out demonstrations after the updates asked for, 0 being the start of training.

    It is the module's loss over all windows of the data module's validation loader, in evaluation mode. Random states
    and the module stay as they were. Notes travel in checkpoints.

    Args:
        steps: Numbers of updates.

    Attributes:
        rows: One mapping with ``updates`` and ``val_loss`` for each, in order.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The loss before any training."""
        self._note(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The loss after this update, if it is asked for."""
        self._note(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The notes so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the notes of the checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step not in self.steps or any(row["updates"] == step for row in self.rows):
            return
        loss = validation_loss(trainer, pl_module)
        self.rows.append({"updates": step, "val_loss": loss})


def validation_loss(trainer: L.Trainer, module: Any) -> float:
    """Mean of ``module.loss`` over the real steps of the data module's validation windows."""
    total, count = 0.0, 0
    with isolated_rng(), observing(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = trainer.strategy.batch_to_device(batch)
            steps = int(batch["mask"].sum())
            total += float(module.loss(batch)) * steps
            count += steps
    return total / count


class About(L.Callback):
    """Write into every checkpoint what it comes from, under ``"about"``.

    Args:
        about: Plain values.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = dict(about)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add it."""
        checkpoint["about"] = self.about
