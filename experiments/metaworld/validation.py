"""The validation loss after given numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from eva_lightning.rl.module import running_mean
from eva_lightning.side_effects import isolated_rng, observing


class ValidationLosses(L.Callback):
    """Measure the loss on the held-out demonstrations after the steps asked for, 0 being the start of training.

    It is the module's loss over all windows of the data module's validation loader, in evaluation mode. Random states
    and the module stay as they were. The losses travel in checkpoints. Lightning's own validation comes at regular
    intervals only.

    Args:
        steps: Numbers of steps.

    Attributes:
        rows: One mapping with ``updates`` (the number of steps) and ``val_loss`` for each, in order.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = frozenset(steps)
        self.rows: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._measure(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step in self.steps and all(row["updates"] != step for row in self.rows):
            self.rows.append({"updates": step, "val_loss": validation_loss(trainer, pl_module)})


def validation_loss(trainer: L.Trainer, module: Any) -> float:
    """Mean of ``module.loss`` over the real steps of the data module's validation windows."""
    mean = running_mean(module.device)
    with isolated_rng(), observing(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = trainer.strategy.batch_to_device(batch)
            mean.update(module.loss(batch).double(), batch["mask"].sum())
    return float(mean.compute())
