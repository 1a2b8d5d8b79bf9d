"""Run a model and a data loader without side effects on generators, modes, buffers and samplers."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (CPU, CUDA) on exit, also after an exception.

    Lightning's ``isolate_rng`` restores nothing when its body raises.
    """
    restore = snapshot_rng()
    try:
        yield
    finally:
        restore()


def snapshot_rng() -> Callable[[], None]:
    """Record the state of the global generators; returns a function that restores it."""
    return partial(set_rng_state, rng_state())


def rng_state() -> dict[str, Any]:
    """The state of the global generators of Python, NumPy and torch (CPU, CUDA), in numbers and tensors only.

    A checkpoint can hold it (``weights_only`` loading).
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy generator is what users' data sets draw from
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the global generators into a state of :func:`rng_state`; those of devices that are gone are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


@contextmanager
def observing(module: nn.Module) -> Iterator[None]:
    """Run the model in eval mode; flags of sub-modules, buffers and metric states are restored on exit.

    Buffers are restored because a sub-module may keep its batch norm in train mode whatever ``eval()`` says.
    """
    modes = [(m, m.training) for m in module.modules()]
    # both the tensors and their values: a forward may write into a buffer or put another in its place
    buffers = [
        (m, name, b, b.detach().clone())
        for m in module.modules()
        for name, b in m._buffers.items()
        if b is not None and b.device.type != "meta"
    ]
    metrics = [(m, _metric_state(m)) for m in module.modules() if hasattr(m, "metric_state")]
    try:
        module.eval()
        yield
    finally:
        for m, flag in modes:
            m.training = flag
        with torch.no_grad():
            for m, name, buffer, value in buffers:
                m._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for m, state in metrics:
            vars(m).update(state)


@contextmanager
def restored_sources(root: object) -> Iterator[None]:
    """Restore the random generators and counters that live in a data loader, its samplers and its data set.

    Walks the attributes of ``root`` and what they hold. Generators of torch, NumPy and Python get their state back;
    the samplers' and data sets' own attributes are set back to the objects they were.
    """
    generators: list[tuple[Any, Any]] = []
    attributes: list[tuple[object, dict[str, Any]]] = []
    for obj in _reachable(root):
        if isinstance(obj, torch.Generator):
            generators.append((obj.set_state, obj.get_state()))
        elif isinstance(obj, np.random.Generator):
            generators.append((_setter(obj.bit_generator, "state"), copy.deepcopy(obj.bit_generator.state)))
        elif isinstance(obj, np.random.RandomState):
            generators.append((obj.set_state, obj.get_state()))
        elif isinstance(obj, random.Random):
            generators.append((obj.setstate, obj.getstate()))
        elif isinstance(obj, (torch.utils.data.Sampler, torch.utils.data.Dataset)):
            attributes.append((obj, dict(vars(obj))))
    try:
        yield
    finally:
        for restore, state in generators:
            restore(state)
        for obj, values in attributes:
            vars(obj).clear()
            vars(obj).update(values)


def _metric_state(metric: nn.Module) -> dict[str, Any]:
    return {k: copy.deepcopy(v) for k, v in vars(metric).items() if k in metric._defaults or k in _METRIC_FLAGS}  # type: ignore[operator]


_METRIC_FLAGS = ("_update_count", "_computed", "_forward_cache", "_update_called", "_is_synced")


def _setter(obj: object, name: str) -> Any:
    return lambda value: setattr(obj, name, value)


def _reachable(root: object, depth: int = 6, width: int = 64) -> Iterator[object]:
    """Objects reached from ``root`` through attributes and small containers; large containers hold data, not RNGs."""
    seen: set[int] = set()
    stack = [(root, depth)]
    while stack:
        obj, left = stack.pop()
        if id(obj) in seen or isinstance(obj, (str, bytes, int, float, torch.Tensor, np.ndarray, type, nn.Module)):
            continue
        seen.add(id(obj))
        yield obj
        if left == 0:
            continue
        if isinstance(obj, dict):
            children: list[object] = list(obj.values()) if len(obj) <= width else []
        elif isinstance(obj, (list, tuple, set)):
            children = list(obj) if len(obj) <= width else []
        else:
            children = list(vars(obj).values()) if hasattr(obj, "__dict__") else []
        stack.extend((child, left - 1) for child in children)
