"""Reading untrusted weight files: no code in them is run, and what is no weight file is named for what it is."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from eva_lightning.errors import InputError
from eva_lightning.names import shown
from eva_lightning.reading import check_ordinary, reading
from eva_lightning.sealed import damage
from eva_lightning.torch_files import load_plain

#: Where training code keeps the weights inside a checkpoint, in the order of preference (as timm has it).
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")

_LIGHTNING_KEY = "pytorch-lightning_version"


def read_weights(file: Path) -> dict[str, Tensor]:
    """Names and tensors of a ``.safetensors`` file or of one that ``torch.save`` wrote.

    The usual containers (`CONTAINERS`) and the prefixes of DDP and torch.compile are taken off. Pickled objects other
    than tensors and plain values are refused, never built (``weights_only``).

    Raises:
        InputError: The file holds no weights; one sentence that says what it looks like and what to do.
    """
    with reading(file, "download it again", "weight file"):
        check_ordinary(file)
        _refuse_impostors(file)
        found = load_file(file) if file.suffix == ".safetensors" else _read_torch(file)
        if not isinstance(found, Mapping):
            raise InputError(
                f"weight file {file} holds a {type(found).__name__} where a mapping of tensors is expected"
            )
        if _LIGHTNING_KEY in found:
            raise _lightning(file)
        container = next((key for key in CONTAINERS if isinstance(found.get(key), Mapping)), None)
        state = clean_state_dict(dict(found if container is None else found[container]))
        tensors = {name: _held(value) for name, value in state.items() if isinstance(value, Tensor)}
        if not tensors:
            keys = ", ".join(shown(key) for key in list(found)[:3] if isinstance(key, str)) or "nothing"
            raise InputError(
                f"weight file {file} holds no tensors (found: {keys}): save the model's state_dict() itself"
            )
    return tensors


def _held(value: Tensor) -> Tensor:
    """A tensor, once all its elements are found to be in the file: a view can repeat one of them a trillion times."""
    if value.device.type != "cpu" or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(value.shape)} has fewer elements in the file")
    return value


def _refuse_impostors(file: Path) -> None:
    with file.open("rb") as handle:
        start = handle.read(256)
    if not start:
        raise InputError(f"weight file {file} is empty: download it again")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise InputError(f"weight file {file} is a web page, not weights (often a login or error page): download again")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(f"weight file {file} is a Git LFS pointer, not the weights: run git lfs pull")


def _read_torch(file: Path) -> Any:
    is_archive = zipfile.is_zipfile(file)
    if is_archive and (reason := damage(file)) is not None:
        raise ValueError(reason)
    try:
        return load_plain(file)
    except pickle.UnpicklingError:
        if is_archive and _is_lightning(file):
            raise _lightning(file) from None
        if not is_archive:
            raise ValueError("it is no file of torch.save, or holds Python objects besides tensors") from None
        raise InputError(
            f"weight file {file} holds Python objects besides tensors, which are not built because that would run "
            "code from the file: save the model's state_dict() with torch.save or safetensors"
        ) from None


def _is_lightning(file: Path) -> bool:
    """Read the names in the pickle without unpickling it."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return any(_LIGHTNING_KEY.encode() in archive.read(name) for name in names)


def _lightning(file: Path) -> InputError:
    return InputError(
        f"{file} is a Lightning checkpoint of a whole module, not a weight file of a backbone: load it with "
        "ImageClassifier.load_from_checkpoint, or pass the weights its training started from"
    )
