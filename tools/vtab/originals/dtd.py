"""Describable Textures, first of the ten official partitions, by torchvision; TFDS ``dtd`` 3.0.1, key: class/file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.vtab.originals.pool import Original, Pool

_NAMES = {"train": "train", "validation": "val", "test": "test"}


def load(folder: Path) -> dict[str, Pool]:
    """The images that ``dtd/dtd/labels/{train,val,test}1.txt`` list; classes are numbered by the alphabet."""
    from torchvision.datasets import DTD

    return {split: _pool(DTD(str(folder), split=name, partition=1)) for split, name in _NAMES.items()}


def _pool(data: Any) -> Pool:
    files: list[Path] = data._image_files
    return Pool([f"{file.parent.name}/{file.name}" for file in files], data._labels, files.__getitem__)


ORIGINALS = (
    Original(
        task="dtd",
        rule="B",
        needs=("dtd/dtd",),
        load=load,
        sizes={"train": 1880, "validation": 1880, "test": 1880},
        hint="torchvision.datasets.DTD(DIR, download=True) gets it",
    ),
)
