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
import statistics
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning as L

if TYPE_CHECKING:
    from torch import Tensor

    from eva_lightning.vision.data.datamodule import VTAB1K
    from eva_lightning.vision.module import ImageClassifier
    from experiments.vtab.benchmark import Settings

#: Key of :func:`measure` -> what it should be.
TARGETS = {"linear_epoch_ratio": "<= 1.05", "lora_epoch_ratio": "<= 1.05"}

METHODS = ("linear", "lora")


def measure(
    settings: Settings, images: int = 256, image_size: int = 64, batch_size: int = 32, rank: int = 16
) -> dict[str, float]:
    """Time epochs of each kind.

    Args:
        settings: Root, task, model, and how many epochs to time after the first, which is left out.
        images: Training images per epoch.
        image_size: Height and width, in pixels.
        batch_size: Images per step.
        rank: LoRA rank.

    Returns:
        For linear probing and LoRA: ``…_epoch_ratio``, and the median seconds of both, ``…_epoch_s`` and ``…_bare_s``.
    """
    from eva_lightning.vision.data.datamodule import VTAB1K
    from experiments.vtab.benchmark_images import task_folder

    figures: dict[str, float] = {}
    with task_folder(settings.root, settings.task, images) as (root, task), TemporaryDirectory() as cache:
        for method in METHODS:
            data = VTAB1K(
                root, task, image_size=image_size, batch_size=batch_size, limit_train=images, limit_test=1,
                cache_dir=cache, progress=False,
            )  # fmt: skip
            ours, bare = _epochs(settings.model, method, data, settings.repeats, rank)
            figures[f"{method}_epoch_ratio"] = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
            figures[f"{method}_epoch_s"] = statistics.median(ours)
            figures[f"{method}_bare_s"] = statistics.median(bare)
    return figures


def _epochs(model: str, method: str, data: VTAB1K, repeats: int, rank: int) -> tuple[list[float], list[float]]:
    """Seconds of our epochs and of the bare ones, in pairs; the first pair is left out."""
    import torch

    from eva_lightning.methods.vision import AdapterOptions, apply_method
    from eva_lightning.vision.epoch_csv import EpochHistory
    from eva_lightning.vision.module import ImageClassifier
    from experiments.demo_runs import quiet

    torch.manual_seed(0)
    module = ImageClassifier(model, data.num_classes, data.image_size)
    callbacks = apply_method(method, module, AdapterOptions(rank=rank))
    data.setup("fit")
    interleaved = _Interleaved(BareLoop(module, data, repeats + 1))
    with quiet():
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=repeats + 1,
            limit_val_batches=0,
            # what runs after the last callback is timed with the next epoch of ours
            callbacks=[*callbacks, EpochHistory(), interleaved],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, datamodule=data)
    return interleaved.ours[1:], interleaved.bare[1:]


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
        import torch

        from eva_lightning.optim.schedules import warmup_cosine

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
        from torch.nn import functional as F

        self.model.train()
        for batch in self.order().split(self.batch_size):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.images[batch]), self.labels[batch]).backward()
            self.optimizer.step()
            self.schedule.step()


class _Interleaved(L.Callback):
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
