"""Pickles of others, read without trusting them: arrays of numbers and plain containers, nothing else is made.

Loading a pickle calls whatever it names. Here it gets a stand-in for every class and function but a few harmless ones:
an object of an unknown class keeps its attributes and does nothing, no module is imported, and no array is larger than
the bytes that the file has for it.
"""

from __future__ import annotations

import codecs
import collections
import io
import math
import pickle
import pickletools
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from eva_lightning.errors import InputError

_NUMBERS = re.compile(r"[<>=|]?[biuf?]\d{0,2}")


class Inert:
    """Stands for an object of a class that is not loaded; its pickled attributes are attributes here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = state[1]
        if isinstance(state, dict):
            vars(self).update({str(name): value for name, value in state.items()})

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Of a list of an unknown class."""

    def extend(self, items: Any) -> None:
        """Of a list of an unknown class."""


class _Kind:
    """What a pickle says of ``numpy.dtype``."""

    def __init__(self, text: Any = "", *flags: Any) -> None:
        if not isinstance(text, str) or not _NUMBERS.fullmatch(text):
            raise InputError("it holds arrays of other things than numbers")
        self.text = text

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.text = order + self.text.lstrip("<>=|")

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type itself."""
        return np.dtype(self.text)


class _Array:
    """What a pickle says of ``numpy.ndarray``, made an array of the bytes that are there."""

    array: npt.NDArray[Any]

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = _shaped(data, kind, shape, "F" if fortran else "C")


def _shaped(data: Any, kind: Any, shape: Any, order: str) -> npt.NDArray[Any]:
    if not isinstance(kind, _Kind) or not isinstance(data, bytes | bytearray | memoryview):
        raise InputError("it holds arrays of other things than numbers")
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if any(type(n) is not int or n < 0 for n in sizes) or math.prod(sizes) * kind.dtype.itemsize != len(data):
        raise InputError(f"an array of shape {sizes} has {len(data)} bytes")
    return np.frombuffer(data, kind.dtype).reshape(sizes, order="F" if order == "F" else "C")


def _from_buffer(data: Any, kind: Any, shape: Any, order: str = "C", *more: Any) -> _Array:
    found = _Array()
    found.array = _shaped(data, kind, shape, order)
    return found


def _scalar(kind: Any, data: Any = b"") -> Any:
    return _shaped(data, kind, (1,), "C")[0]


def _encode(text: Any, encoding: Any = "latin1", *more: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise InputError("it holds text where bytes are expected")
    return text.encode("latin1")


def _reconstructor(kind: Any, base: Any = None, state: Any = None) -> Any:
    return kind() if isinstance(kind, type) and issubclass(kind, Inert) else Inert()


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): _Array,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,
    (codecs.encode.__module__, "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "deque"): collections.deque,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    **{(module, "_reconstruct"): _Array for module in _NUMPY},
    **{(module, "_frombuffer"): _from_buffer for module in _NUMPY},
    **{(module, "scalar"): _scalar for module in _NUMPY},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get((module, name))
        return type("Inert", (Inert,), {"__module__": module, "__qualname__": name}) if found is None else found

    def persistent_load(self, key: Any) -> Any:
        raise InputError("parts of it lie in another file")


def _check_sizes(data: bytes) -> None:
    """Refuse what makes the parser allocate more than the file has: arguments that are cut off, and places in its
    memory that no pickle of this length uses.

    Raises:
        InputError: A place is too far away.
        Exception: An argument is cut off: whatever pickletools raises.
    """
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name.endswith("PUT") and int(argument or 0) > number:
            raise InputError("it refers to a place that is not in it")


def load_pickle(data: bytes) -> Any:
    """The arrays and plain containers of a pickle; objects of all other classes are :class:`Inert`.

    Raises:
        InputError: It holds arrays of other things than numbers, or that have more or fewer bytes than their shape.
        Exception: It is damaged: whatever pickle raises.
    """
    _check_sizes(data)
    return _Unpickler(io.BytesIO(data)).load()


def array_of(value: Any) -> npt.NDArray[Any]:
    """The array in `value`: one of a pickle, a list of such, or numbers.

    Raises:
        InputError: It is none.
    """
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, list | tuple):
        parts = [array_of(part) for part in value]
        if len({part.shape for part in parts}) > 1:
            raise InputError("it holds lists of arrays that differ in shape")
        return np.stack(parts) if parts else np.empty(0)
    if isinstance(value, np.ndarray | np.number | np.bool_ | bool | int | float):
        return np.asarray(value)
    raise InputError(f"it holds {type(value).__qualname__} where an array is expected")
