"""What pre-training and fine-tuning share: the trainer, validation losses, resuming."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from eva_lightning.checkpoint_io import AtomicCheckpointIO
from eva_lightning.rl.module import running_mean
from eva_lightning.rl.protocol import Protocol
from eva_lightning.side_effects import isolated_rng, observing
from experiments.runner import lightning_runs
from experiments.runner.one_machine import one_machine
from experiments.runner.run_folder import RunFolder

_LOGGER = logging.getLogger(__name__)


def log_differences(protocol: Protocol | None) -> None:
    """Say by which protocol a run is done, and what its source does otherwise; nothing for the default one."""
    if protocol is None or not protocol.differences:
        return
    lines = "\n".join(f"- {each}" for each in protocol.differences)
    _LOGGER.info("protocol %s; what its source does otherwise:\n%s", protocol.name, lines)


class About(L.Callback):
    """Write into every checkpoint what it comes from, under ``"about"``.

    Args:
        about: Plain values.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = dict(about)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["about"] = self.about


class ValidationLosses(L.Callback):
    """Measure the loss on the held-out demonstrations after the steps asked for, 0 being the start of training.

    It is the module's loss over all windows of the data module's validation loader, in evaluation mode. Random states
    and the module stay as they were. The losses travel in checkpoints, and loggers get them. Lightning's own validation
    comes at regular intervals only.

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
            loss = validation_loss(trainer, pl_module)
            self.rows.append({"updates": step, "val_loss": loss})
            for logger in trainer.loggers:
                logger.log_metrics({"val_loss": loss}, step=step)


class Looks(L.Callback):
    """Roll the network out after some of the steps of training.

    Nothing of the training changes: the module and the random states stay as they were. What was found travels in
    checkpoints. With several devices the first one rolls out. Weights that are not finite are not rolled out.

    Args:
        steps: Numbers of steps, above 0.
        roll_out: Rolls a module out; gives plain values.

    Attributes:
        rows: One mapping with ``updates`` (the number of steps) and those values for each, in order.
    """

    def __init__(self, steps: Sequence[int], roll_out: Callable[[Any], Mapping[str, Any]]) -> None:
        self.steps = frozenset(steps)
        self.rows: list[dict[str, Any]] = []
        self._roll_out = roll_out

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or step not in self.steps or any(row["updates"] == step for row in self.rows):
            return
        if all(bool(torch.isfinite(parameter).all()) for parameter in pl_module.parameters()):
            with isolated_rng():
                self.rows.append({"updates": step, **self._roll_out(pl_module)})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


def validation_loss(trainer: L.Trainer, module: Any) -> float:
    """Mean of ``module.loss`` over the real steps of the data module's validation windows."""
    mean = running_mean(module.device)
    with isolated_rng(), observing(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = trainer.strategy.batch_to_device(batch)
            mean.update(module.loss(batch).double(), batch["mask"].sum())
    return float(mean.compute())


def make_trainer(
    folder: RunFolder,
    *,
    max_steps: int,
    checkpoint_every: int,
    checkpoint_minutes: float | None = None,
    progress: bool,
    callbacks: Sequence[L.Callback],
    devices: int = 1,
    **options: Any,
) -> L.Trainer:
    """A trainer that counts steps and keeps the last checkpoint.

    Args:
        folder: Checkpoints go into its ``checkpoints``.
        max_steps: Steps to train.
        checkpoint_every: Steps between checkpoints; 0 for none.
        checkpoint_minutes: Least time between checkpoints, instead.
        progress: Show a progress bar, in a terminal.
        callbacks: All others.
        devices: Processes on this machine.
        options: Further arguments of the trainer.
    """
    timed = None if checkpoint_minutes is None else timedelta(minutes=checkpoint_minutes)
    checkpoints = ModelCheckpoint(
        folder.checkpoints,
        filename="last",
        every_n_train_steps=checkpoint_every if timed is None else None,
        train_time_interval=timed,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    keeps = checkpoint_every > 0 or timed is not None
    return L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        devices=devices,
        plugins=[AtomicCheckpointIO(), *one_machine(devices)],
        callbacks=[*callbacks, *([checkpoints] if keeps else [])],
        enable_checkpointing=keeps,
        enable_progress_bar=progress and sys.stdout.isatty(),
        enable_model_summary=False,
        **options,
    )


def fit(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, folder: RunFolder) -> None:
    """Train, from the last checkpoint if there is one, and leave one of the end where the trainer has checkpoints."""
    lightning_runs.fit(
        trainer, module, data, folder.last_checkpoint(), lambda: f"{trainer.global_step} of {trainer.max_steps} steps"
    )
    if trainer.checkpoint_callback is not None:
        trainer.save_checkpoint(folder.checkpoints / "last.ckpt")
