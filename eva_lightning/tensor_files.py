"""Safetensors files with a checksum over their tensors and a document, verified when they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eva_lightning.errors import DamagedFileError
from eva_lightning.sealed import set_aside

_CHECKSUM = "eva_lightning.checksum"
_DOCUMENT = "eva_lightning.document"
_KNOWN = {"format", _CHECKSUM, _DOCUMENT}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], document: str = "") -> None:
    """Write tensors, and a text that belongs to them, with a checksum over both.

    Args:
        file: Where to; the caller sees to it that it appears whole (:func:`eva_lightning.files.replacing`).
        tensors: By name.
        document: Anything, such as JSON; kept in the file's metadata.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # not save_file, which works in a temporary file of its own that a kill leaves behind
    file.write_bytes(save(plain, {"format": "pt", _CHECKSUM: checksum(plain, document), _DOCUMENT: document}))


def read_tensors(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], str | None]:
    """The tensors and the document that :func:`write_tensors` wrote.

    Returns:
        The tensors on the CPU; and the document, or None for a file that holds no checksum because something else wrote
        it.

    Raises:
        DamagedFileError: The file is cut, changed, or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamagedFileError(f"{file} is truncated or not a readable safetensors file: {reason}") from error
    if not ({_CHECKSUM, _DOCUMENT} & set(metadata)) and set(metadata) <= _KNOWN:
        return tensors, None
    document = metadata.get(_DOCUMENT, "")
    if metadata.get(_CHECKSUM) != checksum(tensors, document):
        raise DamagedFileError(f"{file} is damaged (its checksum differs: something in it was changed)")
    return tensors, document


def are_whole(file: Path) -> bool:
    """Whether a file of :func:`write_tensors` is there and as it was written; a damaged one is set aside."""
    if not file.is_file():
        return False
    try:
        read_tensors(file)
    except DamagedFileError as error:
        set_aside(file, str(error), "making it again")
        return False
    return True


def checksum(tensors: Mapping[str, Tensor], document: str = "") -> str:
    """SHA-256 over names, types, shapes and values of tensors on the CPU, and a document."""
    found = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{found.hexdigest()}"
