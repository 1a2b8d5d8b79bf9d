"""PatchCamelyon, from the HDF5 files that torchvision's ``PCAM`` downloads; TFDS ``patch_camelyon`` 2.0.0.

Key: name of the file's split, underscore, number of the image in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError
from tools.vtab.originals.pool import Original, Pool

_NAMES = {"train": "train", "validation": "valid", "test": "test"}


def load(folder: Path) -> dict[str, Pool]:
    """The 96x96 images of ``pcam/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5``.

    Raises:
        RuntimeError: h5py is not installed.
    """
    return {split: _pool(folder / "pcam", name) for split, name in _NAMES.items()}


def _pool(folder: Path, name: str) -> Pool:
    try:
        import h5py
    except ImportError:
        raise RuntimeError("the package h5py is not installed") from None

    def opened(part: str) -> Any:
        path = folder / f"camelyonpatch_level_2_split_{name}_{part}.h5"
        file = h5py.File(path, "r")
        found = file[part]
        # HDF5 can take data from any other file that a link or a data set names
        if not isinstance(file.get(part, getlink=True), h5py.HardLink) or found.external or found.is_virtual:
            raise InputError(f"{path}: {part} lies in another file")
        return found

    labels = opened("y")[:].reshape(-1).tolist()
    return Pool([f"{name}_{index}" for index in range(len(labels))], labels, opened("x").__getitem__)


ORIGINALS = (
    Original(
        task="patch_camelyon",
        rule="B",
        needs=("pcam",),
        load=load,
        sizes={"train": 262144, "validation": 32768, "test": 32768},
        hint="torchvision.datasets.PCAM(DIR, download=True) gets it",
    ),
)
