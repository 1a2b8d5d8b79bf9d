"""Tables of results for the terminal and for Markdown: data frames whose cells may be intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.runner.statistics import Interval, Range

#: Where there is no value.
NOTHING = "–"

#: Digits after the point of all columns, or of each.
Digits = int | Mapping[Any, int]


def cell(value: Any, digits: int = 2, sign: bool = False) -> str:
    """``"0.12 ± 0.03"``, ``"0.12"``, ``"–"``."""
    if isinstance(value, Interval | Range):
        return value.text(digits, sign)
    if value is None or value is pd.NA or value != value:
        return NOTHING
    if isinstance(value, float):
        return f"{value:{'+' if sign else ''}.{digits}f}"
    return str(value)


def as_text(frame: pd.DataFrame, digits: Digits = 2) -> pd.DataFrame:
    """The same table with a text in every cell."""
    columns = {
        column: [cell(value, digits if isinstance(digits, int) else digits.get(column, 2)) for value in values]
        for column, values in frame.items()
    }
    return pd.DataFrame(columns, index=frame.index, columns=frame.columns)


def as_markdown(frame: pd.DataFrame, digits: Digits = 2) -> str:
    """A Markdown table: the index to the left, everything else to the right."""
    sides = ["left", *["right"] * len(frame.columns)]
    return as_text(frame, digits).to_markdown(disable_numparse=True, colalign=sides)


def show(
    frame: pd.DataFrame,
    title: str,
    digits: Digits = 2,
    *,
    notes: Sequence[str] = (),
    console: Console | None = None,
    lines: bool = False,
) -> None:
    """Print a table in the terminal, with `lines` between its rows."""
    terminal = console or Console()
    table = Table(title=title, title_justify="left", show_lines=lines)
    table.add_column(str(frame.index.name or ""))
    for name in frame.columns:
        table.add_column(str(name), justify="right")
    for name, row in as_text(frame, digits).iterrows():
        table.add_row(Text(str(name)), *map(Text, row))
    terminal.print(table)
    for note in notes:
        terminal.print(Text(note, style="dim"))


#: What LaTeX needs instead.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "–": "--", "−": "$-$",
    "°": r"$^\circ$", "±": r"$\pm$", "²": "$^2$", "×": r"$\times$", "√": r"$\sqrt{}$", "Σ": r"$\Sigma$", "ρ": r"$\rho$",
    "ν": r"$\nu$",
}  # fmt: skip
_LATEX_PATTERN = re.compile("|".join(map(re.escape, _LATEX)) + r"|[^\x00-\x7f]")


def latex(text: str) -> str:
    """`text` with LaTeX's special characters and our symbols replaced; a symbol unknown here is a question mark."""
    return _LATEX_PATTERN.sub(lambda match: _LATEX.get(match.group(), "?"), text)
