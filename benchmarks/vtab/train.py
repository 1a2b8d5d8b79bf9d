"""What training costs beside the model: an epoch of Lightning's Trainer with our module and data, and a bare loop.

The bare loop is what one would write by hand for the same model, optimizer and schedule over images that lie in memory
normalised: shuffle, index, forward, cross-entropy, backward, step. Ours is ``Trainer.fit`` with
:class:`~eva_lightning.vision.module.ImageClassifier` and
:class:`~eva_lightning.vision.data.datamodule.VTAB1K`, which normalises decoded images batch by batch, logs epoch means
and keeps a history; neither writes checkpoints. Bare epochs run between ours, so what Lightning does from one epoch to
the next counts as ours. The ratio is the median over epochs of ours ÷ the bare one right after it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Figure, Figures, bare_trainer, quiet
from benchmarks.vtab.images import TaskImages
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.optim.schedules import warmup_cosine
from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.epoch_csv import EpochHistory
from eva_lightning.vision.module import ImageClassifier

METHODS = ("linear", "lora")
TARGET = "<= 1.05"


def measure(
    source: TaskImages,
    model: str = "vit_tiny_patch16_224",
    repeats: int = 7,
    images: int = 256,
    image_size: int = 64,
    batch_size: int = 32,
    rank: int = 16,
) -> Figures:
    """Time epochs of each kind.

    Args:
        source: Root and task.
        model: timm name, on random weights.
        repeats: Epochs to time after the first, which is left out.
        images: Training images per epoch.
        image_size: Height and width, in pixels.
        batch_size: Images per step.
        rank: LoRA rank.

    Returns:
        For linear probing and LoRA: ``…_epoch_ratio``, and the seconds of both, ``…_epoch_s`` and ``…_bare_s``.
    """
    figures: Figures = {}
    for method in METHODS:
        with source.data(images, image_size, batch_size) as data:
            ours, bare = _epochs(model, method, data, repeats, rank)
        figures[f"{method}_epoch_ratio"] = Figure.ratio(ours, bare, TARGET)
        figures[f"{method}_epoch_s"] = Figure.of(ours)
        figures[f"{method}_bare_s"] = Figure.of(bare)
    return figures


def _epochs(model: str, method: str, data: VTAB1K, repeats: int, rank: int) -> tuple[list[float], list[float]]:
    """Seconds of our epochs and of the bare ones, in pairs; the first pair is left out."""
    torch.manual_seed(0)
    module = ImageClassifier(model, data.num_classes, data.image_size)
    callbacks = apply_method(method, module, AdapterOptions(rank=rank))
    data.setup("fit")
    in_turn = EpochsInTurn(BareLoop(module, data, repeats + 1))
    with quiet():
        trainer = bare_trainer(
            accelerator="cpu",
            max_epochs=repeats + 1,
            # what runs after the last callback is timed with the next epoch of ours
            callbacks=[*callbacks, EpochHistory(), in_turn],
        )
        trainer.fit(module, datamodule=data)
    return in_turn.ours[1:], in_turn.bare[1:]


class BareLoop:
    """Trains a copy of a module's model for one epoch at each call, with nothing around it.

    Args:
        module: Model and settings.
        data: Training images, set up.
        epochs: How many there will be, for the schedule.

    Attributes:
        model: The copy.
        order: Gives the order of an epoch's images.
    """

    def __init__(self, module: ImageClassifier, data: VTAB1K, epochs: int) -> None:
        dataset: Any = data.train_dataloader().dataset
        self.images, self.labels = dataset.__getitems__(range(len(dataset)))
        self.batch_size = data.batch_size
        self.model = copy.deepcopy(module.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=module.lr, weight_decay=module.weight_decay)
        total = epochs * -(-len(dataset) // data.batch_size)
        warmup = min(total, round(total * module.warmup_epochs / epochs))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: warmup_cosine(step, warmup, total)
        )
        self.order: Callable[[], Tensor] = lambda: torch.randperm(len(dataset))

    def __call__(self) -> None:
        self.model.train()
        for batch in self.order().split(self.batch_size):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.images[batch]), self.labels[batch]).backward()
            self.optimizer.step()
            self.schedule.step()


class EpochsInTurn(L.Callback):
    """Runs a bare epoch after each of ours, and times both."""

    def __init__(self, bare_epoch: Callable[[], None]) -> None:
        self.bare_epoch = bare_epoch
        self.ours: list[float] = []
        self.bare: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ended = time.perf_counter()
        self.ours.append(ended - self._since)
        self.bare_epoch()
        self._since = time.perf_counter()
        self.bare.append(self._since - ended)
