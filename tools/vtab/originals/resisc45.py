"""NWPU-RESISC45, from its folder of class folders; TFDS ``resisc45`` 3.0.0, key: class, underscore, file name."""

from __future__ import annotations

from pathlib import Path

from tools.vtab.originals.pool import Original, Pool


def load(folder: Path) -> dict[str, Pool]:
    """The 256x256 JPEGs of ``NWPU-RESISC45/<class>``; classes are numbered by the alphabet."""
    root = folder / "NWPU-RESISC45"
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    files = [file for name in classes for file in sorted((root / name).glob("*.jpg"))]
    labels = [classes.index(file.parent.name) for file in files]
    return {"train": Pool([f"{file.parent.name}_{file.name}" for file in files], labels, files.__getitem__)}


ORIGINALS = (
    Original(
        task="resisc45",
        rule="C",
        needs=("NWPU-RESISC45",),
        load=load,
        sizes={"train": 31500},
        hint="unpack NWPU-RESISC45.rar there",
    ),
)
