"""NumPy's files, read without trusting them: nothing is allocated that the file does not hold.

``numpy.load`` allocates what a header promises, whatever that is, and evaluates the header as Python. Files that this
project wrote itself have a known shape and type, and so known first bytes, which are compared and not parsed.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eva_lightning.errors import InputError
from eva_lightning.files import format_bytes

Array = npt.NDArray[Any]

#: Kinds of numbers that are read: truth values, whole numbers, floats.
_KINDS = "biuf"
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
#: Data is never compressed to a hundredth; content of so many bytes may be.
_MOST_RATIO, _HARMLESS = 100, 64 * 2**20


def header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """The first bytes of the ``.npy`` file of an array."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def map_array(path: str | os.PathLike[str], shape: tuple[int, ...], dtype: np.dtype[Any], trailer: int = 0) -> Array:
    """A read-only memory map of a ``.npy`` file that is known to hold an array of this shape and type.

    Args:
        path: The file.
        shape, dtype: Of the array.
        trailer: Bytes behind the array.

    Raises:
        InputError: It is another file.
        OSError: It cannot be read.
    """
    expected = header(shape, dtype)
    n_bytes = math.prod(shape) * dtype.itemsize
    with Path(path).open("rb") as file:
        found = file.read(len(expected))
        size = file.seek(0, os.SEEK_END)
    if found != expected or size != len(expected) + n_bytes + trailer:
        raise InputError(f"{os.fspath(path)} does not hold {dtype} {shape}")
    if n_bytes == 0:
        return np.empty(shape, dtype)
    # a plain array over the same memory: rows of np.memmap are slower to make
    mapped = np.memmap(path, dtype, "r", len(expected), shape)
    return mapped.view(np.ndarray)


def array_from_bytes(data: bytes) -> Array:
    """The array in the bytes of a ``.npy`` file: a read-only view of them.

    Raises:
        InputError: It holds other things than numbers, or more or fewer than its header says.
        Exception: The header is damaged: whatever NumPy raises.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise InputError(f"it has version {version} of the .npy format, which no array of numbers needs")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    start = stream.tell()
    if dtype.kind not in _KINDS or dtype.subdtype is not None:
        raise InputError(f"it holds {dtype.name}, where numbers are expected")
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data) - start:
        raise InputError(f"its header promises {dtype} {shape}, and {len(data) - start} bytes follow")
    array = np.frombuffer(data, dtype, offset=start)
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise InputError("it holds truth values that are neither true nor false")
    return array.reshape(shape, order="F" if fortran else "C")


def arrays_from_npz(content: bytes, names: Sequence[str]) -> dict[str, Array]:
    """The arrays `names` in the bytes of an ``.npz`` file; each is compared with its CRC-32.

    Raises:
        InputError: One is missing, is no array of numbers, or unpacks to more than data does.
        Exception: The file is damaged: whatever its parsers raise.
    """
    found = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [archive.getinfo(f"{name}.npy") for name in names]
        total = sum(member.file_size for member in members)
        if total > max(_HARMLESS, _MOST_RATIO * len(content)):
            raise InputError(f"it would unpack to {format_bytes(total)}")
        for name, member in zip(names, members, strict=True):
            if member.compress_type not in _COMPRESSIONS:
                raise InputError(f"{member.filename} is packed in a way that NumPy does not write")
            found[name] = array_from_bytes(archive.read(member))
    return found
