"""Equations of the site as MathML, which browsers draw themselves: no script, no fonts, offline and in print."""

from __future__ import annotations

import html
import re

# what pymdownx.arithmatex leaves with `generic: true`
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def with_mathml(page: str) -> str:
    """`page` (HTML) with the TeX of each equation as MathML.

    Raises:
        ValueError: An equation that cannot be converted; says which.
    """
    return _EQUATION.sub(lambda found: _mathml(html.unescape(found[3]).strip(), found[2] == "["), page)


def _mathml(tex: str, display: bool) -> str:
    from latex2mathml.converter import convert

    try:
        made: str = convert(tex, display="block" if display else "inline")
    except Exception as error:
        raise ValueError(f"this equation cannot be converted: {tex}") from error
    if "\\" in re.sub(r"<[^>]*>", "", made):
        raise ValueError(f"this equation has a command that is not known: {tex}")
    # a wide equation scrolls, alone and by keyboard
    return f'<div class="equation" role="group" aria-label="equation" tabindex="0">{made}</div>' if display else made
