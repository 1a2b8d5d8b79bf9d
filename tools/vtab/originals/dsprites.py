"""dSprites (tasks ``dsprites_loc`` and ``dsprites_ori``), from the published ``.npz``; TFDS ``dsprites`` 2.0.0.

Key: number of the image. The ``.npz`` holds what the HDF5 file that TFDS reads holds, in the same order.
"""

from __future__ import annotations

import zipfile
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eva_lightning.arrays import array_from_bytes
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.reading import reading
from tools.vtab.originals.pool import Image, Original, Pool

FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_BLOCK = 4096
#: A little more than the images unpack to.
_MOST_BYTES = 3_100_000_000
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
    if not file.is_file():
        raise MissingInputError(f"{file} is not there")
    bits, shape, classes = _read(file, file.stat().st_mtime_ns)

    def image(index: int) -> Image:
        pixels: Image = np.unpackbits(bits[index], count=shape[0] * shape[1]).reshape(shape) * np.uint8(255)
        return pixels

    return {"train": Pool(range(len(classes)), label(column, classes), image)}


@lru_cache(maxsize=1)
def _read(file: Path, time: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int], npt.NDArray[np.int64]]:
    """Images as one bit per pixel (0.4 GB instead of 3), their height and width, and all latents."""
    with reading(file), zipfile.ZipFile(file) as opened:
        classes = array_from_bytes(_member(opened, "latents_classes.npy")).astype(np.int64)
        with opened.open(_checked(opened, "imgs.npy")) as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
                version
            ]
            (count, height, width), _, dtype = read_header(stream)
            if dtype != np.uint8 or len(classes) != count or count * height * width > _MOST_BYTES:
                raise InputError(f"{file} holds other images than dSprites: {dtype} {(count, height, width)}")
            bits = np.empty((count, -(-height * width // 8)), dtype=np.uint8)
            for start in range(0, count, _BLOCK):
                stop = min(start + _BLOCK, count)
                data = stream.read((stop - start) * height * width)
                bits[start:stop] = np.packbits(np.frombuffer(data, dtype=dtype).reshape(stop - start, -1), axis=1)
            if stream.read(1):  # also makes the archive compare its checksum
                raise InputError(f"{file} holds more images than its head says")
    return bits, (height, width), classes


def _member(opened: zipfile.ZipFile, name: str) -> bytes:
    return opened.read(_checked(opened, name))


def _checked(opened: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    info = opened.getinfo(name)
    if info.file_size > _MOST_BYTES or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{opened.filename} holds another {name} than dSprites")
    return info


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
