"""Reading files that others wrote or a disk damaged: a parser's errors become one of ours.

Parsers report bad bytes by whatever happens to go wrong in them, a dozen exceptions of a dozen libraries.
:func:`reading` turns all of them into an :class:`~eva_lightning.errors.InputError` that names the file. Its block holds
the call of a parser and nothing else, so that no mistake of the program is blamed on a file.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import stat
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from eva_lightning.errors import InputError, InputTypeError, MissingInputError
from eva_lightning.files import format_bytes, is_disk_full
from eva_lightning.names import shown

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Bytes of the largest text that is parsed: a hundred times the largest that this project writes.
LARGEST_TEXT = 64 * 2**20


@contextmanager
def reading(path: str | os.PathLike[str], remedy: str = "", what: str = "") -> Iterator[None]:
    """Blame every error in the block on the file `path`.

    Args:
        path: What is read.
        remedy: What to do, as the end of the sentence.
        what: What it is, before its name: ``"weight file"``.

    Raises:
        MissingInputError: There is no such file.
        InputError: It cannot be read, or its content cannot be parsed. Errors of this project pass, with its name.
    """
    name, end = f"{what} {os.fspath(path)}".strip(), f": {remedy}" if remedy else ""
    try:
        yield
    except InputError as error:
        if os.fspath(path) in str(error):
            raise
        raise InputError(f"{name} is damaged ({error}){end}") from error
    except FileNotFoundError as error:
        raise MissingInputError(f"{name} does not exist{end}") from error
    except BaseException as error:
        # parsers written in Rust report a fault by an exception that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if is_disk_full(error):
            raise
        logger.debug("%s cannot be parsed", name, exc_info=True)
        verdict = "cannot be read" if isinstance(error, OSError) and error.errno is not None else "is damaged"
        raise InputError(f"{name} {verdict} ({in_short(error)}){end}") from error


def in_short(error: BaseException) -> str:
    """The first line of an error's message, fit for a terminal; its kind where it says nothing."""
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:  # of YAML
        return f"line {mark.line + 1}: {problem}"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = "".join(character if character.isprintable() else "?" for character in text[:160])
    return text if len(text) > 3 and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".strip()


def check_ordinary(path: str | os.PathLike[str]) -> os.stat_result:
    """What the system says of a file, once it is none that blocks where it is opened, or never ends.

    Raises:
        InputError: It is a folder, a pipe or a device.
        OSError: It is missing, or cannot be reached.
    """
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file"
        raise InputError(f"{os.fspath(path)} must be a file, and is {kind}")
    return found


def read_bytes(path: str | os.PathLike[str], most: int, remedy: str = "", what: str = "") -> bytes:
    """The content of an ordinary file of at most `most` bytes.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is a folder, a pipe or a device, larger, or cannot be read.
    """
    with reading(path, remedy, what):
        found = check_ordinary(path)
        if found.st_size > most:
            raise InputError(f"{os.fspath(path)} is larger than the {format_bytes(most)} that are read of such files")
        with Path(path).open("rb") as file:
            content = file.read(found.st_size)  # a file that grows meanwhile is read as it was
    return content


def read_text(path: str | os.PathLike[str], remedy: str = "", most: int = LARGEST_TEXT) -> str:
    """A file of text in UTF-8.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no ordinary file, too large, or no UTF-8; names the line.
    """
    content = read_bytes(path, most, remedy)
    with reading(path, remedy):
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {content[: error.start].count(10) + 1}: no text in UTF-8") from error


def read_json(path: str | os.PathLike[str], remedy: str = "", *, non_finite: bool = False) -> Any:
    """A JSON document.

    Args:
        path: The file.
        remedy: What to do where it is damaged, as the end of the sentence.
        non_finite: Take Python's ``NaN`` and ``Infinity``, which are no JSON.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no JSON, or has a key twice.
    """
    return parse_json(read_text(path, remedy), path, remedy, non_finite=non_finite)


def parse_json(text: str, path: str | os.PathLike[str], remedy: str = "", *, non_finite: bool = False) -> Any:
    """The JSON document in `text`, which was read from `path`; see :func:`read_json`."""
    with reading(path, remedy):
        constant, number = (float, float) if non_finite else (_refuse, _finite)
        return json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=_once_each)


def typed(kind: type[T], document: Any, path: str | os.PathLike[str]) -> T:
    """An object of the dataclass `kind` from a JSON mapping in `path`; keys that it has no field for are passed over.
    A field with a default may be missing: files from before it have none.

    Raises:
        InputError: No mapping, a field is missing or of another type.
    """
    assert is_dataclass(kind)
    if not isinstance(document, dict):
        raise InputTypeError(f"{os.fspath(path)} is damaged: a mapping is expected, got {type(document).__name__}")
    found: dict[str, Any] = {}
    hints = _hints(kind)
    for item in fields(kind):
        if item.name not in document:
            if item.default is not MISSING:
                continue
            raise InputError(f"{os.fspath(path)} is damaged: {item.name} is missing")
        value = document[item.name]
        if not _fits(value, hints[item.name]):
            raise InputTypeError(
                f"{os.fspath(path)} is damaged: {item.name} has another type than expected, {shown(value)}"
            )
        found[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a type: text, a number, true or false, none, or a list or mapping of these."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(value is None if part is type(None) else _fits(value, part) for part in inside)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_fits(entry, inside[1]) for entry in value.values())
    if origin is tuple:
        return isinstance(value, list) and all(_fits(entry, inside[0]) for entry in value)
    if hint is float:
        # a whole number of JSON may be beyond all floats
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond all numbers")
    return number


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found
