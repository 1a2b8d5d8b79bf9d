"""What runs on a CPU that take a minute or less share: a Trainer, held-out values by epoch, and what is trained."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy

from eva_lightning.checkpoint_io import AtomicCheckpointIO
from eva_lightning.errors import InputError
from eva_lightning.side_effects import isolated_rng, observing
from eva_lightning.vision.data.datamodule import SplitDataset, as_fetched
from eva_lightning.vision.merged_evaluation import merged_in_fp32


def logits_of(module: nn.Module, images: SplitDataset, batch_size: int = 256) -> Tensor:
    """What `module` gives for `images` in evaluation mode, ``(n, outputs)`` fp32; random states stay as they were."""
    device = next(module.parameters()).device
    loader = DataLoader(images, batch_size, collate_fn=as_fetched)
    with isolated_rng(), observing(module), torch.no_grad():
        return torch.cat([module(batch[0].to(device)).float().cpu() for batch in loader])


def measured(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss and accuracy of `logits` ``(n, classes)``.

    Returns:
        ``loss``: mean cross-entropy in nats; ``accuracy``: share that is right; ``class_accuracy``: mean over the
        classes of `labels` of the share of a class that is right.
    """
    classes = logits.shape[1]
    per_class = multiclass_accuracy(logits, labels, classes, average="none")
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float(multiclass_accuracy(logits, labels, classes, average="micro")),
        # not average="macro", which counts a class that is predicted but has no image here as wrong
        "class_accuracy": float(per_class[labels.unique()].mean()),
    }


def evaluate(module: nn.Module, images: SplitDataset, batch_size: int = 256) -> dict[str, float]:
    """What :func:`measured` gives of `module` on `images`."""
    return measured(logits_of(module, images, batch_size), images.labels)


class Evaluations(L.Callback):
    """Note what :func:`evaluate` gives after some epochs, counted from 1. Notes travel in checkpoints.

    Args:
        images: Held-out images.
        epochs: After which epochs.

    Attributes:
        rows: One mapping per evaluation: ``epoch`` and what :func:`evaluate` gives.
        predicted: The classes that the last evaluation found, one per image.
    """

    def __init__(self, images: SplitDataset, epochs: Collection[int]) -> None:
        self.images = images
        self.epochs = frozenset(epochs)
        self.rows: list[dict[str, float]] = []
        self.predicted: list[int] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate with adapters merged into the weights: the same function, a third faster."""
        epoch = trainer.current_epoch + 1
        if epoch not in self.epochs:
            return
        with contextlib.ExitStack() as stack:
            # weights that are not finite cannot be merged: training has diverged, which the loss will say
            with contextlib.suppress(InputError):
                stack.enter_context(merged_in_fp32(pl_module))
            logits = logits_of(pl_module, self.images)
        self.rows.append({"epoch": epoch, **measured(logits, self.images.labels)})
        self.predicted = logits.argmax(dim=1).tolist()

    def curve(self, quantity: str) -> list[float]:
        """``"epoch"``, ``"loss"`` or ``"accuracy"`` of every evaluation."""
        return [row[quantity] for row in self.rows]

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


class FirstStep(L.Callback):
    """The state of affairs when training begins, with adapters in place.

    Attributes:
        trainable_parameters: How many there are.
        at: When, by ``time.perf_counter``.
    """

    def __init__(self) -> None:
        self.trainable_parameters = 0
        self.at = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what is trained."""
        self.at = time.perf_counter()
        self.trainable_parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)


class StopAfter(L.Callback):
    """End training after an epoch, counted from 1, though the schedule of the learning rate goes on; None: never."""

    def __init__(self, epoch: int | None) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        if trainer.current_epoch + 1 == self.epoch:
            trainer.should_stop = True


def quick_trainer(
    epochs: int,
    callbacks: Sequence[L.Callback],
    progress: bool = False,
    accelerator: str = "cpu",
    validate: bool = True,
) -> L.Trainer:
    """A Trainer that logs and keeps nothing by itself."""
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
