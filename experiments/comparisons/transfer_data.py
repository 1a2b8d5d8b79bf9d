"""Caltech101 in two halves: the classes to pre-train on, and 1,000 images of the others to fine-tune on.

Everything is drawn by hashing names with a seed, so that a split is the same with any version of any library.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.data.datamodule import Batch, EpochShuffle, SplitDataset, as_fetched
from eva_lightning.vision.data.image_cache import cached_images
from eva_lightning.vision.data.split_files import Split, read_split
from eva_lightning.vision.data.tasks import get_task

TASK = "caltech101"

#: Share of the images of every pre-training class that is kept back, to see what the pre-training has learned.
HELD_OUT = 0.1

#: Least area of a random crop, as a share of the image.
LEAST_AREA = 0.2

#: Most that brightness, contrast and saturation are changed by, as a share.
JITTER = 0.4


@dataclass(frozen=True)
class Halves:
    """Disjoint sets of images of disjoint classes; labels count from 0 within each half.

    Attributes:
        pretraining, held_out: Images of the first half: to train on, and to evaluate on.
        train, tuning, validation: 1,000 images of the second half, and the 800 and 200 that they are made of.
        test: The other images of the second half.
        classes: Classes of the first and of the second half.
    """

    pretraining: Split
    held_out: Split
    train: Split
    tuning: Split
    validation: Split
    test: Split
    classes: tuple[int, int]

    def of(self, phase: str) -> tuple[Split, Split]:
        """Images to fine-tune on and to evaluate on, in tuning (``"tune"``) or in the comparison (``"final"``)."""
        return (self.tuning, self.validation) if phase == "tune" else (self.train, self.test)


def read_images(root: str | Path) -> Split:
    """All images of the task, whatever split file lists them.

    Raises:
        MissingInputError: The folder, a split file or an image is missing.
        InputError: A line of a split file cannot be read, or an image is listed with two labels.
    """
    folder = Path(root) / TASK
    if not folder.is_dir():
        raise MissingInputError(
            f"{folder} does not exist: this experiment needs the {TASK} folder of VTAB-1K (train800val200.txt, "
            "test.txt and the images); pass the folder it lies in as --root"
        )
    classes = get_task(TASK).classes
    labels: dict[str, int] = {}
    for name in ("train800val200", "test"):
        split = read_split(folder, name, classes)
        for path, label in zip(split.paths, split.labels, strict=True):
            if labels.setdefault(path, label) != label:
                raise InputError(f"{folder / path} is listed with the labels {labels[path]} and {label}")
    missing = [path for path in labels if not (folder / path).is_file()]
    if missing:
        raise MissingInputError(
            f"image {folder / missing[0]} is missing ({len(missing)} of {len(labels)} are): copy the folder again"
        )
    return Split("all", folder, tuple(labels), tuple(labels.values()))


def split_classes(counts: Mapping[int, int], seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two halves of the classes with about as many images each.

    Classes of neighbouring size form pairs, and chance says which of a pair goes where; one that is left goes to the
    first half.

    Args:
        counts: Class -> number of images.
        seed: Of the draw.

    Returns:
        Classes to pre-train on and classes to fine-tune on, in ascending order.
    """
    by_size = sorted(counts, key=lambda label: (-counts[label], label))
    halves: tuple[list[int], list[int]] = ([], [])
    for place in range(0, len(by_size), 2):
        pair = by_size[place : place + 2]
        flip = _drawn(seed, f"pair {place}") % 2 if len(pair) == 2 else 0
        for number, label in enumerate(pair):
            halves[(number + flip) % 2].append(label)
    first, second = (tuple(sorted(half)) for half in halves)
    return first, second


def split_halves(images: Split, seed: int, train: int = 1000, validation: int = 200) -> Halves:
    """Classes to halves, and the images of each half to what they are for.

    The training images come from all classes in turn, as those of Caltech101 in VTAB-1K do, until there are `train`;
    no class gives more than half of its images, so that all are tested.

    Args:
        images: All of them.
        seed: Of every draw.
        train: Images to fine-tune on.
        validation: How many of these are for choosing learning rates.

    Raises:
        InputError: There are fewer images than that, or `validation` is not below `train`.
    """
    if not 0 < validation < train:
        raise InputError(f"validation images must be from 1 to {train - 1} of the {train} training images, "
                         f"got {validation}")  # fmt: skip
    by_class: dict[int, list[str]] = {}
    for path, label in zip(images.paths, images.labels, strict=True):
        by_class.setdefault(label, []).append(path)
    for paths in by_class.values():
        paths.sort(key=lambda path: _drawn(seed, path))
    first, second = split_classes({label: len(paths) for label, paths in by_class.items()}, seed)

    kept = {label: max(1, round(HELD_OUT * len(by_class[label]))) for label in first}
    candidates = [
        (turn, _drawn(seed, path), path)
        for label in second
        for turn, path in enumerate(by_class[label][: len(by_class[label]) // 2])
    ]
    if len(candidates) < train:
        raise InputError(
            f"{images.folder} has {len(candidates)} images to fine-tune on (half of those of {len(second)} classes), "
            f"but {train} are asked for"
        )
    chosen = {path for _, _, path in sorted(candidates)[:train]}
    # another draw: the first one says which images of a class are taken, so large classes have its low numbers
    in_order = sorted(chosen, key=lambda path: _drawn(seed, f"order {path}"))
    rest = [path for label in second for path in by_class[label] if path not in chosen]

    label_of = dict(zip(images.paths, images.labels, strict=True))

    def part(name: str, paths: list[str], classes: tuple[int, ...]) -> Split:
        number = {label: index for index, label in enumerate(classes)}
        labels = tuple(number[label_of[path]] for path in paths)
        return Split(f"half{seed}-{name}", images.folder, tuple(paths), labels)

    return Halves(
        pretraining=part("pretraining", [p for label in first for p in by_class[label][kept[label] :]], first),
        held_out=part("held-out", [p for label in first for p in by_class[label][: kept[label]]], first),
        train=part(f"train{train}", in_order, second),
        tuning=part(f"tuning{train - validation}", in_order[:-validation], second),
        validation=part(f"validation{validation}", in_order[-validation:], second),
        test=part("test", rest, second),
        classes=(len(first), len(second)),
    )


def decoded(split: Split, image_size: int, cache: Path, progress: bool = False) -> SplitDataset:
    """Normalised images ``(3, image_size, image_size)`` of `split`, decoded once into `cache`.

    Raises:
        InputError: An image cannot be decoded.
        OSError: The disk is full.
    """
    pixels = cached_images(split, image_size, cache, progress=progress)
    if pixels is None:
        raise OSError(errno.ENOSPC, "no room for the decoded images", str(cache))
    # a memory map re-reads the file for every batch where other programs have pushed it out of the page cache
    return SplitDataset(split, image_size, np.asarray(pixels).copy())


class TransferData(L.LightningDataModule):
    """Training batches ``(images, labels)`` of a data set, in an order of their own; the last batch may be smaller.

    Args:
        train: Normalised images.
        batch_size: Images per batch.
        seed: Of the order.
        crop_to: Side of random crops, flipped at random, in pixels; None for images as they are.
    """

    def __init__(self, train: SplitDataset, batch_size: int = 64, seed: int = 0, crop_to: int | None = None) -> None:
        super().__init__()
        self.train = train
        self.batch_size = batch_size
        self.seed = seed
        self.crop_to = crop_to

    def train_dataloader(self) -> DataLoader[Batch]:
        """Images ``(B, 3, H, W)`` fp32 and labels ``(B,)`` int64."""
        return DataLoader(
            self.train,
            batch_size=self.batch_size,
            sampler=EpochShuffle(len(self.train), self.seed),
            collate_fn=as_fetched,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Crop, flip and jitter while training, by numbers that depend on seed and step alone."""
        if self.crop_to is None or self.trainer is None or not self.trainer.training:
            return batch
        # by step, so that a resumed run equals an uninterrupted one
        state = np.random.SeedSequence([self.seed, self.trainer.global_step]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        return random_jitter(random_crops(batch[0], self.crop_to, generator), generator), batch[1]


def random_crops(images: Tensor, size: int, generator: torch.Generator, least_area: float = LEAST_AREA) -> Tensor:
    """A random square of every image, flipped from left to right half of the time.

    Args:
        images: Shape ``(B, 3, H, W)``.
        size: Height and width of the result, in pixels; bilinear.
        generator: Where the numbers come from.
        least_area: Least area of the square, as a share of the image; uniform from there to 1.

    Returns:
        Shape ``(B, 3, size, size)``.
    """
    n = len(images)
    side = torch.empty(n).uniform_(least_area, 1.0, generator=generator).sqrt()
    centre = (1 - side)[:, None] * torch.empty(n, 2).uniform_(-1, 1, generator=generator)
    flip = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0
    zero = torch.zeros(n)
    rows = [torch.stack([side * flip, zero, centre[:, 0]], 1), torch.stack([zero, side, centre[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(images), [n, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_jitter(images: Tensor, generator: torch.Generator, most: float = JITTER) -> Tensor:
    """Change brightness, contrast and saturation of every image, each by a random share of up to `most`.

    Args:
        images: Normalised, shape ``(B, 3, H, W)``.
        generator: Where the numbers come from.
        most: At most so much more or less; 0 leaves images as they are.

    Returns:
        Shape ``(B, 3, H, W)``.
    """
    factors = torch.empty(3, len(images), 1, 1, 1).uniform_(-most, most, generator=generator).to(images)
    brightness, contrast, saturation = factors[0], 1 + factors[1], 1 + factors[2]
    grey = images.mean(dim=1, keepdim=True)
    images = grey + saturation * (images - grey)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + brightness + contrast * (images - mean)


def _drawn(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:8], "big")
