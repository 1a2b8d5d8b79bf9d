"""The pieces of a page on the terminal."""

from __future__ import annotations

from rich.console import Console

from experiments.report.page import Table
from experiments.runner import tables

#: Tables are this wide where standard output is no terminal.
_WIDTH = 112


def say(*lines: str) -> None:
    """Print lines of text, wrapped."""
    for line in lines:
        _console().print(line, highlight=False, markup=False)


def show(table: Table) -> None:
    """Print a table with its notes."""
    tables.show(table.cells, table.caption, notes=table.notes, console=_console(), lines=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _WIDTH))
