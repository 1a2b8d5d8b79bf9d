"""What a comparison shows while it runs: a live display in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType

import rich.progress
from rich.console import RenderableType
from rich.text import Text

#: Without a terminal, a line about progress after so many seconds.
EVERY_SECONDS = 30.0
_LAST = 5


class _Bar(rich.progress.Progress):
    """A progress bar with the last runs below it."""

    last: Iterable[str] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(f"  {line}", style="dim") for line in self.last)


class Progress:
    """Shows how far a comparison is, for as long as its context lasts.

    Args:
        title: What is running.
        done: Runs that were over before this session.
        total: All runs.
        show: False for nothing.
        live: Redraw in place; None where standard output is a terminal.
    """

    def __init__(self, title: str, done: int, total: int, show: bool = True, live: bool | None = None) -> None:
        self._done = done
        self._total = total
        self._show = show
        self._started = self._said = self._first = time.monotonic()
        self._mine = 0
        self._last: deque[str] = deque(maxlen=_LAST)
        self._bar = _Bar(
            title,
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            "{task.fields[eta]}",
            transient=True,
            refresh_per_second=4,
            disable=not (show and (sys.stdout.isatty() if live is None else live)),
        )
        self._bar.last = self._last
        self._row = self._bar.add_task("runs", total=total, completed=done, eta="")

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bar.disable:
            self._bar.stop()

    def finished(self, text: str, total: int | None = None) -> None:
        """One more run is over.

        Args:
            text: Which and how.
            total: All runs, where their number has changed.
        """
        self._done += 1
        self._mine += 1
        self._total = total or self._total
        if self._mine == 1:
            # starting processes and decoding images is not what the other runs will take
            self._first = time.monotonic()
        self._last.append(text)
        if not self._bar.disable:
            self._bar.update(self._row, completed=self._done, total=self._total, eta=self._eta())
        elif self._show and (time.monotonic() - self._said >= EVERY_SECONDS or self._done == self._total):
            self._said = time.monotonic()
            print(f"[{self._done}/{self._total}] {text}; {self._eta()}", flush=True)

    def _eta(self) -> str:
        now, left = time.monotonic(), self._total - self._done
        if not left:
            return f"{span(now - self._started)} in all"
        if self._mine < 3:
            return "…"
        return f"{span((now - self._first) / (self._mine - 1) * left)} to go"


def span(seconds: float) -> str:
    """A duration as people say it: ``"45 s"``, ``"12 min"``, ``"3.5 h"``, ``"6 days"``, ``"1,020 years"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365.25:,.0f} years"
