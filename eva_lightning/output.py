"""What eva_lightning says while it works: records of the logger ``eva_lightning``, which a screen shows as they fit.

Like Lightning's own lines they are of level INFO, whatever the root logger's level is, and are printed where nobody has
set up logging; a program that has (``logging.basicConfig``) gets them by its own handlers, as one line each.
``logging.getLogger("eva_lightning").setLevel(logging.WARNING)`` silences them.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eva_lightning.errors import EVAWarning

_LOGGER = logging.getLogger("eva_lightning")
_TABLE = "eva_lightning_table"


class Screen(logging.Handler):
    """Prints to whatever standard output is at the moment: a progress bar stands in for it while it is drawn.

    A record that has a table is shown as that table on a terminal and in a notebook, and as its plain line elsewhere.
    What the encoding of the output has no characters for is escaped: nothing fails because of a layer's name.

    Args:
        warnings_apart: Print what is worth a warning to standard error.
    """

    def __init__(self, warnings_apart: bool = True) -> None:
        super().__init__()
        self._warnings_apart = warnings_apart

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message alone, with its level where that is worth a look; tracebacks are for files."""
        console, table = Console(), getattr(record, _TABLE, None)
        if table is not None and _has_lines(console) and (console.is_terminal or console.is_jupyter):
            console.print(table)
            return
        text, calm = record.getMessage(), record.levelno <= logging.INFO
        where = sys.stdout if calm or not self._warnings_apart else sys.stderr
        encoding = getattr(where, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        print(text if calm else f"{record.levelname.lower()}: {text}", file=where, flush=True)


def is_first() -> bool:
    """Whether this is the first of several processes, or the only one."""
    # not at the top: commands set up logging before they import torch
    from lightning.pytorch.utilities import rank_zero_only
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def say(line: str) -> None:
    """Log a line; in the first of several processes only."""
    if is_first():
        _LOGGER.info("%s", line)


def warn(message: str, category: type[Warning] = EVAWarning) -> None:
    """Warn; in the first of several processes only."""
    if is_first():
        warnings.warn(message, category, stacklevel=3)


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """Log a table of names and values; in the first of several processes only. Its line has the same words."""
    if not is_first():
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    line = "; ".join(f"{name}: {value}" for name, value in rows)
    _LOGGER.info("%s: %s", title, line, extra={_TABLE: table})


def can_animate() -> bool:
    """Whether a progress bar can be drawn: on a terminal, and in a notebook that has ipywidgets, unless silenced.

    rich would warn in each refresh of a notebook without them.
    """
    console = Console()
    if not _has_lines(console) or not _LOGGER.isEnabledFor(logging.INFO):
        return False
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


def _has_lines(console: Console) -> bool:
    """Whether the characters that bars and tables are drawn with can be written."""
    return console.encoding.startswith("utf")


def _nobody_else_listens(record: logging.LogRecord) -> bool:
    """Whether no handler but our own takes this record: one for errors only, or for nothing, does not."""
    logger: logging.Logger | None = _LOGGER
    while logger is not None:
        others = [x for x in logger.handlers if x is not _SCREEN and not isinstance(x, logging.NullHandler)]
        if any(record.levelno >= handler.level for handler in others):
            return False
        logger = logger.parent if logger.propagate else None
    return True


_SCREEN = Screen()
_SCREEN.addFilter(_nobody_else_listens)
_LOGGER.addHandler(_SCREEN)
if _LOGGER.level == logging.NOTSET:
    _LOGGER.setLevel(logging.INFO)
