"""Docstrings on the site: roles such as ``:class:`EVAState``` become code, as Markdown knows none."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Replace roles in every docstring by the name alone, as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = without_roles(obj.docstring.value)


def without_roles(text: str) -> str:
    """`text` of a docstring with ``:func:`~package.name``` as the code ``name``."""
    return _ROLE.sub(lambda found: f"`{_shown(found)}`", text)


def _shown(found: re.Match[str]) -> str:
    return found[1].rpartition(".")[2] if ":`~" in found[0] else found[1]
