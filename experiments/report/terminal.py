"""The pieces of a page on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable

from experiments.report.page import Table

#: Tables are this wide where standard output is no terminal.
_WIDTH = 112


def say(*lines: str) -> None:
    """Print lines of text, wrapped; ``[bold]`` marks are rich's."""
    for line in lines:
        _console().print(line, highlight=False)


def show(table: Table) -> None:
    """Print a table below its caption."""
    view = RichTable()
    view.add_column(str(table.cells.index.name), no_wrap=True)
    for name in table.cells.columns:
        view.add_column(str(name), justify="right", no_wrap=len(str(name)) < 12)
    for header, cells in table.cells.iterrows():
        view.add_row(str(header), *cells, end_section=True)
    say(table.caption)
    _console().print(view)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _WIDTH))
