"""What pre-training and fine-tuning share: the trainer, and resuming."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from experiments.runner.run_folder import RunFolder

_LOGGER = logging.getLogger(__name__)


class About(L.Callback):
    """Write into every checkpoint what it comes from, under ``"about"``.

    Args:
        about: Plain values.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = dict(about)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["about"] = self.about


def make_trainer(
    folder: RunFolder,
    *,
    max_steps: int,
    checkpoint_every: int,
    progress: bool,
    callbacks: Sequence[L.Callback],
    **options: Any,
) -> L.Trainer:
    """A trainer that counts steps and keeps the last checkpoint.

    Args:
        folder: Checkpoints go into its ``checkpoints``.
        max_steps: Steps to train.
        checkpoint_every: Steps between checkpoints; 0 for none.
        progress: Show a progress bar, in a terminal.
        callbacks: All others.
        options: Further arguments of the trainer.
    """
    checkpoints = ModelCheckpoint(
        folder.checkpoints,
        filename="last",
        every_n_train_steps=checkpoint_every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    return L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[*callbacks, *([checkpoints] if checkpoint_every else [])],
        enable_checkpointing=checkpoint_every > 0,
        enable_progress_bar=progress and sys.stdout.isatty(),
        enable_model_summary=False,
        **options,
    )


def fit(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, folder: RunFolder) -> None:
    """Train, from the last checkpoint if there is one, and leave one of the end where the trainer has checkpoints."""
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        _LOGGER.info("resuming from %s", checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        # how Lightning ends on Ctrl-C
        _LOGGER.warning(
            "interrupted after %d of %d steps; rerun to resume from the last checkpoint", trainer.global_step,
            trainer.max_steps,
        )  # fmt: skip
        raise
    if trainer.checkpoint_callback is not None:
        trainer.save_checkpoint(folder.checkpoints / "last.ckpt")
