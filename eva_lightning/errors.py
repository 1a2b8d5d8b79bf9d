"""One-line errors for names that do not exist, with the nearest names that do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, choices: Iterable[str], *, list_all: bool = True) -> str:
    """Sentence saying that `name` is no known `kind`, with up to three near names from `choices`.

    Args:
        kind: What was asked for, such as ``"task"``.
        name: The name given.
        choices: The names that exist.
        list_all: Name all choices when none is near (leave off for long registries).
    """
    known = list(choices)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}: did you mean {' or '.join(near)}?"
    return f"unknown {kind} {name!r}" + (f": choose from {', '.join(known)}" if list_all else "")
