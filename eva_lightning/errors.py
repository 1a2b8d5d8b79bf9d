"""The errors of this project: what was given cannot be used, said in one sentence.

Checks raise :class:`InputError` or one of its subclasses; command lines print its message and end with exit status 2.
Every other exception is a fault of the program: it keeps its traceback.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any


class InputError(ValueError):
    """Something that a user gave cannot be used.

    Args:
        message: One sentence naming the thing, what is expected and the value given.
        setting: Name of the setting or argument at fault, where it is one: command lines turn it into the option.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class InputTypeError(InputError, TypeError):
    """A value has the wrong type."""


class MissingInputError(InputError, FileNotFoundError):
    """A file or folder that is needed does not exist."""


class MissingPackageError(InputError, ImportError):
    """A package that is needed for this, and only for some of what there is, is not installed."""


class UnreachableError(InputError, ConnectionError):
    """A server that is needed does not answer."""


class EVAWarning(UserWarning):
    """A fit does less than it seems to: adapters that do not train, layers that never ran, a run that diverged."""


class UnwritableError(InputError, OSError):
    """A file or folder cannot be written, for a reason other than a full disk."""


class DiskFullError(InputError, OSError):
    """A disk is full; what was on it before is still there."""


class DamagedFileError(InputError):
    """A file that this project wrote is not as it was written."""


def unknown(kind: str, name: str, choices: Iterable[str], *, list_all: bool = True) -> str:
    """Sentence saying that `name` is no known `kind`, with up to three near names from `choices`.

    Args:
        kind: What was asked for, such as ``"task"``.
        name: The name given.
        choices: The names that exist.
        list_all: Name all choices when none is near (leave off for long registries).
    """
    known = list(choices)
    by_lower = {choice.lower(): choice for choice in known}
    near = [by_lower[found] for found in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)]
    if near:
        return f"unknown {kind} {_shown(name)}: did you mean {' or '.join(near)}?"
    return f"unknown {kind} {_shown(name)}" + (f": choose from {', '.join(known)}" if list_all else "")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Make sure that `value` is one of `choices`.

    Raises:
        InputError: It is not; suggests the nearest.
    """
    known = list(choices)
    if value not in known:
        raise InputError(unknown(name.replace("_", " "), value, known), setting=name)


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Make sure that `value` is a finite number within the bounds given.

    Args:
        name: Of the setting or argument.
        value: What was given.
        at_least, above, at_most, below: Bounds; None for none.
        whole: Whole numbers only.

    Raises:
        InputTypeError: It is no number, or none of the kind asked for.
        InputError: It is out of bounds, infinite or NaN.
    """
    bounds = (("of at least", at_least), ("above", above), ("of at most", at_most), ("below", below))
    expected = " and ".join(
        f"{word} {bound if isinstance(bound, int) else format(bound, 'g')}"
        for word, bound in bounds
        if bound is not None
    )
    message = f"{name} must be a {'whole ' if whole else ''}number {expected}".rstrip() + f", got {_shown(value)}"
    if isinstance(value, bool) or not isinstance(value, int if whole else Real):
        raise InputTypeError(message, setting=name)
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    within = (
        math.isfinite(number)
        and (at_least is None or number >= at_least)
        and (above is None or number > above)
        and (at_most is None or number <= at_most)
        and (below is None or number < below)
    )
    if not within:
        raise InputError(message, setting=name)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"
