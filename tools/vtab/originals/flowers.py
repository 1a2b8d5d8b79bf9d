"""Oxford Flowers 102, by torchvision; TFDS ``oxford_flowers102`` 2.1.*, key: file name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.vtab.originals.pool import Original, Pool

_NAMES = {"train": "train", "validation": "val", "test": "test"}


def load(folder: Path) -> dict[str, Pool]:
    """The images of ``flowers-102/jpg`` by the official split of ``setid.mat``; labels count from 0."""
    from torchvision.datasets import Flowers102

    return {split: _pool(Flowers102(str(folder), split=name)) for split, name in _NAMES.items()}


def _pool(data: Any) -> Pool:
    files: list[Path] = data._image_files
    return Pool([file.name for file in files], data._labels, files.__getitem__)


ORIGINALS = (
    Original(
        task="oxford_flowers102",
        rule="B",
        needs=("flowers-102",),
        load=load,
        sizes={"train": 1020, "validation": 1020, "test": 6149},
        hint="torchvision.datasets.Flowers102(DIR, download=True) gets it",
    ),
)
