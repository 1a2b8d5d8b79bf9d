"""Docstrings as griffe's Google style and Markdown want them: entries of one name each, and names as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([^`]+)`")
_SECTION = re.compile(r"^(Args|Attributes|Raises):$")
_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+): (.*)$")


class Readable(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = one_name_each(without_roles(obj.docstring.value))


def without_roles(text: str) -> str:
    """`text` of a docstring with ``:func:`~package.name``` as the code ``name``, and ``Example::`` as ``Example:``."""
    text = re.sub(r"::$", ":", text, flags=re.M)
    return _ROLE.sub(lambda found: f"`{found[2].rpartition('.')[2] if found[1] else found[2]}`", text)


def one_name_each(text: str) -> str:
    """`text` of a docstring with entries for several names (``width, depth: ...``) repeated for each of them."""
    lines, made = text.splitlines(), []
    in_section, position = False, 0
    while position < len(lines):
        line = lines[position]
        position += 1
        if line and not line.startswith(" "):
            in_section = bool(_SECTION.match(line))
        entry = _SEVERAL.match(line) if in_section else None
        if entry is None:
            made.append(line)
            continue
        indent, names, words = entry.groups()
        more = []
        while position < len(lines) and lines[position].startswith(f"{indent} "):
            more.append(lines[position])
            position += 1
        for name in names.split(", "):
            made += [f"{indent}{name}: {words}", *more]
    return "\n".join(made)
