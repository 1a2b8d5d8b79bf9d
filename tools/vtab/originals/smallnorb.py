"""smallNORB (tasks ``smallnorb_azi`` and ``smallnorb_ele``), from its binary matrices; TFDS ``smallnorb`` 2.0.0.

Key: number of the pair of images. Of each stereo pair the left image is used.
"""

from __future__ import annotations

import gzip
import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.reading import reading
from tools.vtab.originals.pool import Original, Pool

_FILES = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training-{}.mat",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing-{}.mat",
}
#: First number of a file -> type of its elements.
_TYPES: dict[int, np.dtype[Any]] = {0x1E3D4C55: np.dtype(np.uint8), 0x1E3D4C54: np.dtype("<i4")}
#: Larger than the largest file, the training images with 0.45 GB.
_MOST_BYTES = 2**30
_MOST_DIMENSIONS = 8
#: Columns of the info matrix: instance, elevation (0 to 8), azimuth (0, 2, ..., 34), lighting.
_ELEVATION, _AZIMUTH = 1, 2


def read_matrix(file: Path) -> npt.NDArray[np.generic]:
    """A matrix of the NORB format, gzipped or not.

    Little-endian 32-bit numbers come first: the type, the number of dimensions, and at least three sizes.

    Raises:
        InputError: The file is of another format, or incomplete.
    """
    with reading(file, "download it again"), (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
        head = stream.read(8)
        kind, dimensions = (int.from_bytes(head[at : at + 4], "little") for at in (0, 4))
        if kind not in _TYPES or not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise InputError(f"{file} is no matrix of the NORB format")
        sizes = np.frombuffer(stream.read(4 * max(3, dimensions)), dtype="<i4")
        shape = tuple(int(size) for size in sizes[:dimensions])
        dtype = _TYPES[kind]
        expected = math.prod(shape) * dtype.itemsize
        if min(shape) < 0 or expected > _MOST_BYTES:
            raise InputError(f"{file} promises a matrix of {shape}, larger than any of smallNORB's")
        data = stream.read(expected + 1)  # to the end, where gzip compares its checksum
        if len(data) != expected:
            held = f"more than {expected}" if len(data) > expected else len(data)
            raise InputError(f"{file} holds {held} bytes where its head promises {expected}")
        return np.frombuffer(data, dtype).reshape(shape)


def label(column: int, info: npt.NDArray[np.generic]) -> list[int]:
    """The elevation as it is, the azimuth halved."""
    labels: list[int] = (info[:, column].astype(int) // (2 if column == _AZIMUTH else 1)).tolist()
    return labels


def load(column: int, folder: Path) -> dict[str, Pool]:
    """The 96x96 left images of ``smallnorb-*-{training,testing}-dat.mat`` with a column of ``-info.mat`` as label."""
    return {split: _pool(column, folder, name) for split, name in _FILES.items()}


def _pool(column: int, folder: Path, name: str) -> Pool:
    images = _left_images(_file(folder, name.format("dat")))
    labels = label(column, read_matrix(_file(folder, name.format("info"))))
    return Pool(range(len(labels)), labels, images.__getitem__)


def _file(folder: Path, name: str) -> Path:
    """The file `name` in the folder ``smallnorb``, perhaps gzipped."""
    file = folder / "smallnorb" / name
    zipped = file.with_name(f"{name}.gz")
    if not (file.is_file() or zipped.is_file()):
        raise MissingInputError(f"{file} is not there")
    return file if file.is_file() else zipped


@lru_cache(maxsize=2)
def _left_images(file: Path) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(read_matrix(file)[:, 0], dtype=np.uint8)


ORIGINALS = tuple(
    Original(
        task=task,
        rule="E",
        needs=("smallnorb",),
        load=partial(load, column),
        sizes={"train": 24300, "test": 24300},
        hint="put the four files smallnorb-*-dat.mat and smallnorb-*-info.mat there, gzipped or not",
    )
    for task, column in (("smallnorb_azi", _AZIMUTH), ("smallnorb_ele", _ELEVATION))
)
