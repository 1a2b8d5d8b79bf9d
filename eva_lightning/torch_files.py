"""Files of ``torch.save`` that others wrote: tensors and plain values alone, in no more memory than bytes.

``weights_only`` runs no code of a file, but lets it call ``bytearray`` with any number: a file of a kilobyte that takes
all memory. And archives that are packed, as torch never writes them, unpack to a thousand times their size.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from eva_lightning.errors import InputError
from eva_lightning.sealed import is_unusual

#: How a pickle names the call; the reader of ``weights_only`` knows no other way.
_CALLS = (b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n")


def load_plain(file: str | os.PathLike[str]) -> Any:
    """The tensors, on the CPU, and the plain values of a file.

    Raises:
        InputError: Loading it could take more memory than it has bytes.
        Exception: It is damaged, or holds other objects: whatever torch raises.
    """
    with Path(file).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if any(content.find(call) >= 0 for call in _CALLS):
            raise InputError(f"{os.fspath(file)} makes byte arrays of any size, which no weights need")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(map(is_unusual, archive.infolist())):
                raise InputError(f"{os.fspath(file)} has packed parts or folders, which torch.save never writes")
    return torch.load(file, map_location="cpu", weights_only=True)
