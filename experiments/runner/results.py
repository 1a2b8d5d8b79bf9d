"""What a comparison has found out: its runs as tables, its choices, its failures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.errors import DamagedFileError
from eva_lightning.sealed import read_sealed_json, set_aside, write_sealed_json
from experiments.runner.command import DIVERGED
from experiments.runner.schedule import Row, Schedule
from experiments.runner.tuning import Choice


@dataclass(frozen=True)
class Results:
    """What there is so far.

    Attributes:
        runs: One row per finished final run: its tags, then its metrics, ``id`` and ``path``.
        tuning: The same of tuning runs.
        choices: By the names of cells.
        failures: Text and traceback of each failed run.
        left: Runs that are still to do.
        held_up: Names of cells whose choice waits for failed tuning runs.
        without_choice: Names of cells for which every point failed or diverged.
        seconds: All finished runs took, one after another.
    """

    runs: pd.DataFrame
    tuning: pd.DataFrame
    choices: Mapping[str, Choice]
    failures: tuple[tuple[str, str], ...] = ()
    left: int = 0
    held_up: tuple[str, ...] = ()
    without_choice: tuple[str, ...] = ()
    seconds: float = 0.0

    @classmethod
    def of(cls, schedule: Schedule) -> Results:
        """The results of a schedule as it is now."""
        done = schedule.with_status("done")
        counts = schedule.counts()
        return cls(
            runs=_frame(row for row in done if row.job.phase == "final"),
            tuning=_frame(row for row in done if row.job.phase == "tune"),
            choices=schedule.choices(),
            failures=tuple((str(row.job), row.error or "no traceback") for row in schedule.with_status("failed")),
            left=counts["pending"] + counts["running"] + counts["later"],
            held_up=tuple(cell.name for cell in schedule.held_up()),
            without_choice=tuple(cell.name for cell in schedule.without_choice()),
            seconds=sum(float((row.metrics or {}).get("seconds", 0.0)) for row in done),
        )

    @property
    def exit_status(self) -> int:
        """Of a command: 1 where something failed, else 3 where a final run diverged."""
        if self.failures or self.without_choice:
            return 1
        return DIVERGED if len(self.diverged) else 0

    @property
    def diverged(self) -> pd.DataFrame:
        """The final runs that did."""
        return self.runs[self.runs["diverged"].notna()] if "diverged" in self.runs else self.runs[:0]

    @property
    def is_complete(self) -> bool:
        """Whether everything that was asked for is done."""
        return not (self.left or self.failures or self.held_up or self.without_choice)


def _frame(rows: Iterable[Row]) -> pd.DataFrame:
    return pd.DataFrame(
        [{**(row.metrics or {}), **row.job.tags, "id": row.job.id, "path": str(row.job.path)} for row in rows]
    )


def write_choices(file: Path, choices: Mapping[str, Choice]) -> None:
    """Note what was chosen, where the file lacks it, and keep what earlier comparisons in this folder have chosen.

    A damaged file is set aside.
    """
    known = {}
    if file.is_file():
        try:
            known = read_sealed_json(file)
        except DamagedFileError as error:
            set_aside(file, str(error), "writing the choices of this comparison alone")
    noted = {name: _as_noted(choice) for name, choice in choices.items()}
    if any(known.get(name) != entry for name, entry in noted.items()):
        write_sealed_json(file, {**known, **noted})


def _as_noted(choice: Choice) -> dict[str, Any]:
    candidates = [{**point.as_dict(), "score": list(score)} for point, score in choice.candidates.items()]
    return {**choice.point.as_dict(), "score": list(choice.score), "candidates": candidates}
