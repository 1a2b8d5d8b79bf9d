"""SVHN, cropped digits, by torchvision; TFDS ``svhn_cropped`` 3.0.0, key: number of the image in its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.vtab.originals.pool import Image, Original, Pool


def load(folder: Path) -> dict[str, Pool]:
    """The 32x32 images of ``{train,test}_32x32.mat``; digit 0, stored as 10, has label 0."""
    from torchvision.datasets import SVHN

    return {split: _pool(SVHN(str(folder), split=split)) for split in ("train", "test")}


def _pool(data: Any) -> Pool:
    def image(index: int) -> Image:
        pixels: Image = data.data[index].transpose(1, 2, 0)
        return pixels

    return Pool(range(len(data.data)), data.labels.tolist(), image)


ORIGINALS = (
    Original(
        task="svhn",
        rule="A90",
        needs=("train_32x32.mat", "test_32x32.mat"),
        load=load,
        sizes={"train": 73257, "test": 26032},
        hint="torchvision.datasets.SVHN(DIR, 'train', download=True), and the same with 'test', get it",
    ),
)
