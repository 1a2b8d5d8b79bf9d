"""dSprites (tasks ``dsprites_loc`` and ``dsprites_ori``), from the published ``.npz``; TFDS ``dsprites`` 2.0.0.

Key: number of the image. The ``.npz`` holds what the HDF5 file that TFDS reads holds, in the same order.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tools.vtab.originals.pool import Image, Original, Pool

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_BLOCK = 4096
#: Columns of latents_classes: colour, shape, scale, orientation, x, y.
_ORIENTATION, _X = 3, 4


def label(column: int, classes: npt.NDArray[np.int64]) -> list[int]:
    """16 classes: of the 40 orientations 2 or 3 in turn, of the 32 positions 2 each."""
    values = {_ORIENTATION: 40, _X: 32}[column]
    labels: list[int] = np.floor(classes[:, column] / (values / 16)).astype(int).tolist()
    return labels


def load(column: int, folder: Path) -> dict[str, Pool]:
    """The 64x64 images of `FILE`, 0 and 1 made 0 and 255, with the latent of `column` as label."""
    file = folder / FILE
    bits, shape, classes = _read(file, file.stat().st_mtime_ns)

    def image(index: int) -> Image:
        pixels: Image = np.unpackbits(bits[index], count=shape[0] * shape[1]).reshape(shape) * np.uint8(255)
        return pixels

    return {"train": Pool(range(len(classes)), label(column, classes), image)}


@lru_cache(maxsize=1)
def _read(file: Path, time: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int], npt.NDArray[np.int64]]:
    """Images as one bit per pixel (0.4 GB instead of 3), their height and width, and all latents."""
    with np.load(file) as data:
        classes = data["latents_classes"].astype(np.int64)
    with zipfile.ZipFile(file) as opened, opened.open("imgs.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        (count, height, width), _, dtype = read_header(stream)
        bits = np.empty((count, -(-height * width // 8)), dtype=np.uint8)
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            data = stream.read((stop - start) * height * width * dtype.itemsize)
            bits[start:stop] = np.packbits(np.frombuffer(data, dtype=dtype).reshape(stop - start, -1), axis=1)
    return bits, (height, width), classes


ORIGINALS = tuple(
    Original(
        task=task,
        rule="D",
        needs=(FILE,),
        load=partial(load, column),
        sizes={"train": 737280},
        hint="it is in the repository dsprites-dataset of google-deepmind on GitHub",
    )
    for task, column in (("dsprites_loc", _X), ("dsprites_ori", _ORIENTATION))
)
