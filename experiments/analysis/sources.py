"""The models and data to analyse: a small ViT on digits, a timm backbone on a VTAB-1K task, a Decision Transformer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import rich.progress
import torch
from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from torch import nn

from eva_lightning.adapters.targets import find_targets
from eva_lightning.batch_forward import MaskFn
from eva_lightning.errors import InputError
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.trajectories import TrajectoryDataModule
from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.digits import DigitsClassifier, DigitsDataModule, load_digits_split
from eva_lightning.vision.module import ImageClassifier
from experiments.analysis.settings import Settings
from experiments.comparisons.digits_run import CLASSES, pretrain_once, pretrained_folder, starting_model, weights_in
from experiments.metaworld.finetune_run import without_adapters
from experiments.runner.lightning_runs import on_gpu
from experiments.vtab.settings import weights_in_words
from experiments.vtab.weights import obtain_weights

#: Images or windows per step of a training, where nothing else is said.
BATCH_SIZE = 32


@dataclass(frozen=True)
class Tuning:
    """What a training starts from.

    Attributes:
        module: With pre-trained weights, without adapters.
        data: Its training data, `images` samples an epoch.
        exclude: Layers that get no adapter besides the head.
        bias: Biases to train.
    """

    module: Any
    data: L.LightningDataModule
    exclude: tuple[str, ...] = ()
    bias: Any = "all"


class Source(Protocol):
    """A pre-trained model and data that it has not seen."""

    settings: Settings
    model_text: str
    data_text: str

    @property
    def module(self) -> nn.Module:
        """What runs on a minibatch."""

    @property
    def samples(self) -> Callable[[Sequence[int]], Any]:
        """From numbers of samples to a minibatch of them."""

    @property
    def mask_fn(self) -> MaskFn | None:
        """Which tokens count."""

    def tuning(self, seed: int, batch_size: int = BATCH_SIZE) -> Tuning:
        """A training from the pre-trained weights."""


@dataclass(frozen=True)
class Streamed:
    """The model, the layers that EVA adapts, and minibatches in any order and size."""

    source: Source

    @cached_property
    def model(self) -> nn.Module:
        """On the device that is asked for, if it is there."""
        return self.source.module.to("cuda" if self._on_gpu else "cpu")

    @cached_property
    def layers(self) -> dict[str, nn.Module]:
        """By name."""
        module: Any = self.model
        exclude = without_adapters(module) if isinstance(module, DecisionTransformerModule) else None
        names, _ = find_targets(module, exclude=exclude, head=getattr(module, "head_name", "auto"))
        return {name: module.get_submodule(name) for name in names}

    @property
    def _on_gpu(self) -> bool:
        return self.source.settings.source != "digits" and on_gpu(self.source.settings.accelerator)

    def batches(self, size: int, what: str, order: Sequence[int] | None = None) -> Iterator[Any]:
        """Minibatches of `size` samples with a progress bar.

        Args:
            size: Samples in each; the last may have fewer.
            what: Said beside the bar.
            order: Numbers of the samples to use; all, in one fixed order, if not given.
        """
        settings = self.source.settings
        order = range(settings.images) if order is None else order
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        console, shown = Console(stderr=True), settings.progress and sys.stderr.isatty()
        device = next(self.model.parameters()).device
        watched = rich.progress.track(chunks, what, console=console, transient=True, disable=not shown)
        for chunk in watched:
            yield move_data_to_device(self.source.samples(list(chunk)), device)


def order_of(n: int, seed: int) -> list[int]:
    """The numbers below `n` in an order of their own for each seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def open_source(settings: Settings) -> Source:
    """Check and load what the settings name.

    Raises:
        InputError: Something is missing or wrong, or there are fewer samples than are to be used.
    """
    kinds: dict[str, type[Digits] | type[Vision] | type[Robots]] = {
        "digits": Digits,
        "vision": Vision,
        "robots": Robots,
    }
    return kinds[settings.source](settings)


def _enough(settings: Settings, there: int, what: str) -> None:
    if settings.images > there:
        raise InputError(f"images must be at most {there}, {what}, got {settings.images}", setting="images")


class Digits:
    """The demo's small ViT, pre-trained on the digits 0-4, and images of the digits 5-9."""

    mask_fn: MaskFn | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        images = load_digits_split(CLASSES, tune_share=0.0, test_share=0.0).train.tensors[0]
        _enough(settings, len(images), "the images of the digits 5-9")
        self._images = images[order_of(len(images), 0)]
        folder = pretrained_folder(settings.output, settings.pretrain_epochs)
        self.pretrained = pretrain_once(folder)
        self._weights: Path = weights_in(folder)
        self.model_text = "ViT of 0.45 M parameters, pre-trained on the digits 0-4"
        self.data_text = f"{settings.images} images of the digits 5-9"

    @cached_property
    def module(self) -> nn.Module:
        return starting_model(self._weights)

    def samples(self, numbers: Sequence[int]) -> torch.Tensor:
        """Images ``(n, 1, 8, 8)``."""
        return self._images[list(numbers)]

    def tuning(self, seed: int, batch_size: int = BATCH_SIZE) -> Tuning:
        data = DigitsDataModule(CLASSES, n_labels=200, batch_size=batch_size, seed=seed)
        return Tuning(DigitsClassifier(starting_model(self._weights), self.settings.rate), data)


class Vision:
    """A timm backbone and the training images of a VTAB-1K task."""

    mask_fn: MaskFn | None = None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._weights = obtain_weights(str(settings.model), settings.weights)
        self._data = self._open(seed=0)
        _enough(settings, len(self._data.data.train), f"the training images of {settings.task}")
        self.model_text = f"{settings.model}, {weights_in_words(settings.weights)}, at {settings.image_size} px"
        self.data_text = f"{settings.images} images of {settings.task}"

    def _open(self, seed: int, batch_size: int = BATCH_SIZE, limit: int | None = None) -> VTAB1K:
        settings = self.settings
        return VTAB1K(
            settings.root,
            str(settings.task),
            image_size=settings.image_size,
            batch_size=batch_size,
            cache_dir=Path(settings.output) / "cache",
            limit_train=limit,
            seed=seed,
            progress=settings.progress,
        )

    @cached_property
    def module(self) -> ImageClassifier:
        settings = self.settings
        return ImageClassifier(
            str(settings.model), self._data.num_classes, settings.image_size, self._weights, lr=settings.rate
        )

    @cached_property
    def _images(self) -> Any:
        self._data.setup("fit")
        return self._data.train_dataloader().dataset

    @cached_property
    def _order(self) -> list[int]:
        return order_of(len(self._images), 0)

    def samples(self, numbers: Sequence[int]) -> Any:
        """Images ``(n, 3, H, W)`` and labels ``(n,)``; the files' order goes by class."""
        return self._images.__getitems__([self._order[number] for number in numbers])

    def tuning(self, seed: int, batch_size: int = BATCH_SIZE) -> Tuning:
        L.seed_everything(seed, verbose=False)
        settings = self.settings
        module = ImageClassifier(
            str(settings.model), self._data.num_classes, settings.image_size, self._weights, lr=settings.rate
        )
        return Tuning(module, self._open(seed, batch_size, settings.images))


class Robots:
    """A pre-trained Decision Transformer and windows of a Meta-World task's demonstrations."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.module = DecisionTransformerModule.from_pretrained(str(settings.checkpoint))
        self.mask_fn: MaskFn | None = self.module.mask_fn
        self._data = self._open(seed=0)
        dataset: Any = self._data.train_dataloader().dataset
        self._dataset = dataset
        _enough(settings, len(dataset), f"the windows of {settings.task}'s demonstrations")
        parameters = sum(p.numel() for p in self.module.parameters())
        self.model_text = f"Decision Transformer of {parameters / 1e6:.2g} M parameters"
        self.data_text = f"{settings.images} windows of {self.module.context} steps of {settings.task}"

    def _open(self, seed: int, batch_size: int = BATCH_SIZE) -> TrajectoryDataModule:
        return TrajectoryDataModule(
            self.settings.data,
            [str(self.settings.task)],
            context=self.module.context,
            batch_size=batch_size,
            val_episodes=0,
            seed=seed,
            samples_per_epoch=max(self.settings.images, batch_size),
        )

    @cached_property
    def _windows(self) -> dict[str, torch.Tensor]:
        windows: dict[str, torch.Tensor] = self._dataset[(0, 0, self.settings.images)]
        return windows

    def samples(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Windows, random ones."""
        return {name: values[list(numbers)] for name, values in self._windows.items()}

    def tuning(self, seed: int, batch_size: int = BATCH_SIZE) -> Tuning:
        rate = self.settings.rate
        module = DecisionTransformerModule.from_pretrained(
            str(self.settings.checkpoint), lr=rate, min_lr=min(1e-6, rate)
        )
        return Tuning(module, self._open(seed, batch_size), tuple(without_adapters(module)), "none")
