"""The size of what the engines of one initialisation hold, as they predict it and as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from torch import Tensor

from eva_lightning import streaming
from eva_lightning.capture import InputCapture


@contextlib.contextmanager
def recorded_captures(captures: list[InputCapture]) -> Iterator[None]:
    """Add every capture that is made meanwhile to `captures`, which keeps its engines alive."""

    def record(*args: Any, **kwargs: Any) -> InputCapture:
        captures.append(InputCapture(*args, **kwargs))
        return captures[-1]

    with mock.patch.object(streaming, "InputCapture", record):
        yield


def state_bytes(capture: InputCapture) -> tuple[int, int]:
    """Predicted and real bytes of all engines; shared storages count once."""
    engines = [engine for name, engine in capture.engines.items() if name not in capture.owner]
    storages: dict[int, int] = {}
    for engine in engines:
        for tensor in _tensors(engine, set()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(engine.state_bytes for engine in engines), sum(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)
