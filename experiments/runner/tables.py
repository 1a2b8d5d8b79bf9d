"""Tables of results for the terminal, for Markdown, LaTeX and CSV: data frames whose cells may be intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eva_lightning.files import write_text
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


def as_text(frame: pd.DataFrame, digits: Digits = 2, sign: bool = False) -> pd.DataFrame:
    """The same table with a text in every cell."""
    columns = {
        column: [cell(value, digits if isinstance(digits, int) else digits.get(column, 2), sign) for value in values]
        for column, values in frame.items()
    }
    return pd.DataFrame(columns, index=frame.index, columns=frame.columns)


def as_markdown(frame: pd.DataFrame, digits: Digits = 2, *, sign: bool = False, index: bool = True) -> str:
    """A Markdown table: the index to the left, everything else to the right."""
    text = as_text(frame, digits, sign)
    sides = ["left"] * index + ["right"] * len(text.columns)
    return text.to_markdown(index=index, disable_numparse=True, colalign=sides)


def as_latex(frame: pd.DataFrame, caption: str, label: str, digits: Digits = 2, *, index: bool = True) -> str:
    """A ``table`` environment of the package booktabs."""
    text = as_text(frame, digits).map(latex)
    text.columns = pd.Index([latex(str(name)) for name in frame.columns])
    text.index = pd.Index([latex(str(name)) for name in frame.index], name=frame.index.name)
    layout = "l" * index + "r" * len(text.columns)
    return text.to_latex(index=index, caption=latex(caption), label=label, column_format=layout, position="t")


def as_csv(frame: pd.DataFrame, *, index: bool = True) -> str:
    """Everything unrounded; an interval is three columns: mean, low and high."""
    return unfolded(frame).to_csv(index=index)


def unfolded(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with columns ``X``, ``X low`` and ``X high`` for each column ``X`` of intervals."""
    columns: dict[Any, list[Any]] = {}
    for name, values in frame.items():
        columns[name] = [value.mean if isinstance(value, Interval | Range) else value for value in values]
        if any(isinstance(value, Interval | Range) for value in values):
            columns[f"{name} low"] = [getattr(value, "low", None) for value in values]
            columns[f"{name} high"] = [getattr(value, "high", None) for value in values]
    return pd.DataFrame(columns, index=frame.index)


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


def write_table(
    frame: pd.DataFrame, path: Path, caption: str, digits: Digits = 2, *, notes: Sequence[str] = ()
) -> list[Path]:
    """Write a table as ``PATH.md``, ``PATH.tex`` and ``PATH.csv``; returns the files.

    Args:
        frame: The table.
        path: Without a suffix; its name is the label in LaTeX.
        caption: What is in it.
        digits: Digits after the point, in Markdown and LaTeX.
        notes: Sentences below it, such as ``statistics.PLUS_MINUS``.
    """
    texts = {
        ".md": "\n\n".join([f"**{caption}**", as_markdown(frame, digits), *notes]) + "\n",
        ".tex": as_latex(frame, " ".join([caption, *notes]), f"tab:{path.name}", digits),
        ".csv": as_csv(frame),
    }
    files = [path.with_name(path.name + suffix) for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        write_text(file, text)
    return files


#: What LaTeX needs instead.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "–": "--", "−": "$-$",
    "±": r"$\pm$", "²": "$^2$", "×": r"$\times$", "√": r"$\sqrt{}$", "Σ": r"$\Sigma$", "ρ": r"$\rho$", "ν": r"$\nu$",
}  # fmt: skip
_LATEX_PATTERN = re.compile("|".join(map(re.escape, _LATEX)) + r"|[^\x00-\x7f]")


def latex(text: str) -> str:
    """`text` with LaTeX's special characters and our symbols replaced; a symbol unknown here is a question mark."""
    return _LATEX_PATTERN.sub(lambda match: _LATEX.get(match.group(), "?"), text)
