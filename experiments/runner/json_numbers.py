"""Numbers that JSON lacks. A run that diverged has NaN and infinity among its metrics; its file stays JSON.

``{"loss": NaN}`` becomes ``{"loss": null, "not_finite": [[["loss"], "nan"]]}``: other programs read that a number is
missing, and this one which it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_KEY = "not_finite"


def packed(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with null for every NaN and infinity, and with a list of them if there are any."""
    found = list(_not_finite(document, ()))
    content = {key: _without(value) for key, value in document.items()}
    return {**content, _KEY: [[list(path), str(number)] for path, number in found]} if found else content


def unpacked(document: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`packed` was given.

    Raises:
        ValueError: The list does not fit the document.
    """
    if not isinstance(document, Mapping):
        raise ValueError("no mapping in it")
    content = dict(document)
    try:
        for (*path, last), text in content.pop(_KEY, ()):
            place: Any = content
            for key in path:
                place = place[key]
            if place[last] is not None or math.isfinite(number := float(text)):
                raise ValueError(f"{_KEY} names what is a number")
            place[last] = number
    except (TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{_KEY} does not fit") from error
    return content


def _not_finite(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, float(value)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _not_finite(entry, (*path, key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _not_finite(entry, (*path, index))


def _without(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _without(entry) for key, entry in value.items()}
    return [_without(entry) for entry in value] if isinstance(value, list | tuple) else value
