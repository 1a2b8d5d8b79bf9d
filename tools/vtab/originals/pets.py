"""Oxford-IIIT Pet, by torchvision; TFDS ``oxford_iiit_pet`` 3.2.0, key: file name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.vtab.originals.pool import Original, Pool

_NAMES = {"train": "trainval", "test": "test"}


def load(folder: Path) -> dict[str, Pool]:
    """The images of ``oxford-iiit-pet/annotations/{trainval,test}.txt`` with their breeds, counted from 0."""
    from torchvision.datasets import OxfordIIITPet

    return {split: _pool(OxfordIIITPet(str(folder), split=name)) for split, name in _NAMES.items()}


def _pool(data: Any) -> Pool:
    files: list[Path] = data._images
    return Pool([file.name for file in files], data._labels, files.__getitem__)


ORIGINALS = (
    Original(
        task="oxford_iiit_pet",
        rule="A80",
        needs=("oxford-iiit-pet",),
        load=load,
        sizes={"train": 3680, "test": 3669},
        hint="torchvision.datasets.OxfordIIITPet(DIR, download=True) gets it",
    ),
)
