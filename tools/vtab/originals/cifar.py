"""CIFAR-100 (task ``cifar``), by torchvision; TFDS ``cifar100`` 3.0.2, key: number of the image in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.vtab.originals.pool import Image, Original, Pool


def load(folder: Path) -> dict[str, Pool]:
    """The fine labels and 32x32 images of ``cifar-100-python/{train,test}``, in the order of the files."""
    from torchvision.datasets import CIFAR100

    return {split: _pool(CIFAR100(str(folder), train=split == "train")) for split in ("train", "test")}


def _pool(data: Any) -> Pool:
    def image(index: int) -> Image:
        pixels: Image = data.data[index]
        return pixels

    return Pool(range(len(data.data)), data.targets, image)


ORIGINALS = (
    Original(
        task="cifar",
        rule="A90",
        needs=("cifar-100-python",),
        load=load,
        sizes={"train": 50000, "test": 10000},
        hint="torchvision.datasets.CIFAR100(DIR, download=True) gets it",
    ),
)
