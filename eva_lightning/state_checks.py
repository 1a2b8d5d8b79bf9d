"""What every part of an EVA state must be, checked where one is saved and where one is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eva_lightning.errors import InputError

_MOST = 2**63


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_finite(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < _MOST
    return isinstance(value, float) and math.isfinite(value)


def _is_amount(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_mapping(value: Any) -> bool:
    """Whether it is a mapping that JSON has: without infinity and NaN, at any depth."""
    try:
        return isinstance(value, dict) and bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


def _is_curve(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(point, list | tuple) and len(point) == 2 and _is_count(point[0]) and _is_finite(point[1])
        for point in value
    )


#: Field -> what each of its values is, and whether it is.
_PER_LAYER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "ranks": ("a whole number of at least 0", _is_count),
    "total_variance": ("a finite number of at least 0", _is_amount),
    "n_samples": ("a whole number of at least 0", _is_count),
    "converged": ("true or false", lambda value: isinstance(value, bool)),
    "shared_with": ("the name of a layer", lambda value: isinstance(value, str)),
    "convergence": ("pairs of a number of minibatches and a finite value", _is_curve),
    "widths": ("a whole number of at least 1", _is_size),
}
_SINGLE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "n_batches": ("a whole number of at least 0", _is_count),
    "seconds": ("a finite number of at least 0", _is_amount),
    "meta": ("a mapping, all numbers in it finite", _is_mapping),
}

#: Of the numbers in the tensors, with what rounding to bf16 adds: components are unit vectors.
_RANGES = {
    "components": (-1.01, 1.01),
    "singular_values": (0.0, math.inf),
    "explained_variance_ratio": (0.0, 1.01),
}

DOCUMENT_FIELDS = (*_PER_LAYER, *_SINGLE)
"""The fields that are no tensors."""


def check_document(document: Mapping[str, Any]) -> None:
    """Make sure that the fields that are no tensors have the types and ranges of an EVA state.

    Raises:
        InputError: One is missing, or is something else; without the name of the file.
    """
    if missing := sorted({*_PER_LAYER, *_SINGLE} - set(document)):
        raise InputError(f"it lacks {', '.join(missing)}")
    for name, (expected, fits) in _SINGLE.items():
        if not fits(document[name]):
            raise InputError(f"{name} must be {expected}, got {_short(document[name])}")
    for name, (expected, fits) in _PER_LAYER.items():
        if not isinstance(document[name], dict):
            raise InputError(f"{name} must be a mapping from layers, got {_short(document[name])}")
        for layer, value in document[name].items():
            if not isinstance(layer, str) or not fits(value):
                raise InputError(f"{name} of layer {layer!r} must be {expected}, got {_short(value)}")


def check_agreement(document: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Make sure that all fields speak of the same layers and sizes.

    Args:
        document: As :func:`check_document` has passed it.
        tensors: ``components``, ``singular_values`` and ``explained_variance_ratio``, by layer.

    Raises:
        InputError: They do not; without the name of the file.
    """
    layers = tensors["singular_values"].keys()
    for name, found in (
        ("explained_variance_ratio", tensors["explained_variance_ratio"]),
        ("total_variance", document["total_variance"]),
        ("n_samples", document["n_samples"]),
    ):
        if differ := sorted(found.keys() ^ layers):
            raise InputError(f"{name} and singular_values must name the same layers, only one has {differ[0]!r}")
    if unknown := sorted(tensors["components"].keys() - layers):
        raise InputError(f"components of layer {unknown[0]!r} have no singular values")
    for name in ("converged", "shared_with", "convergence", "widths"):
        if unknown := sorted(document[name].keys() - layers - document["ranks"].keys()):
            raise InputError(f"{name} speaks of layer {unknown[0]!r}, which no other field has")
    for layer, owner in document["shared_with"].items():
        if owner not in layers or owner in document["shared_with"]:
            raise InputError(f"layer {layer!r} shares the decomposition of {owner!r}, which has none of its own")
    for layer in layers:
        _check_layer(layer, document, {name: found[layer] for name, found in tensors.items() if layer in found})


def _check_layer(layer: str, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{name} of layer {layer!r} must be finite floating-point numbers")
        least, most = _RANGES[name]
        if tensor.numel() and not bool(((tensor.double() >= least) & (tensor.double() <= most)).all()):
            raise InputError(f"{name} of layer {layer!r} must be numbers from {least:.0f} to {most:.0f}")
    count = tensors["singular_values"].numel()
    width = document["widths"].get(layer)
    shapes: dict[str, tuple[int, ...]] = {"singular_values": (count,), "explained_variance_ratio": (count,)}
    if "components" in tensors:
        shapes["components"] = (count, tensors["components"].shape[-1] if width is None else width)
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{name} of layer {layer!r} must have shape {shape}, got {tuple(tensors[name].shape)}")
    rank, most = document["ranks"].get(layer, 0), count if width is None else min(count, width)
    if rank > most:
        raise InputError(f"the rank of layer {layer!r} must be at most its {most} components, got {rank}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
