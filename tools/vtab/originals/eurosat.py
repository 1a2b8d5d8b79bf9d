"""EuroSAT, RGB, by torchvision; TFDS ``eurosat/rgb`` 2.0.0, key: class, underscore, file name (which has it again)."""

from __future__ import annotations

from pathlib import Path

from tools.vtab.originals.pool import Original, Pool


def load(folder: Path) -> dict[str, Pool]:
    """The 64x64 JPEGs of ``eurosat/2750/<class>``; classes are numbered by the alphabet."""
    from torchvision.datasets import EuroSAT

    data = EuroSAT(str(folder))
    files = [Path(path) for path, _ in data.samples]
    keys = [f"{file.parent.name}_{file.name}" for file in files]
    return {"train": Pool(keys, data.targets, files.__getitem__)}


ORIGINALS = (
    Original(
        task="eurosat",
        rule="C",
        needs=("eurosat/2750",),
        load=load,
        sizes={"train": 27000},
        hint="torchvision.datasets.EuroSAT(DIR, download=True) gets it",
    ),
)
