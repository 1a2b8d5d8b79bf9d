"""What to run next: the tuning of every cell, and its final runs as soon as its own tuning is complete."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from experiments.runner.cells import Cell
from experiments.runner.jobs import Job, Outcome, Point
from experiments.runner.tuning import Choice, Score, beyond, choose, mean_scores

Status = Literal["pending", "running", "done", "failed"]

#: A run that has taken so many worker processes down with it is a failure, not bad luck.
MOST_DEATHS = 3


@dataclass
class Row:
    """A job and how far it is."""

    job: Job
    status: Status
    metrics: dict[str, Any] | None = None
    error: str | None = None
    deaths: int = 0


@dataclass
class CellState:
    """How far a cell is: runs by point, the choice when it is made, and its final runs."""

    cell: Cell
    place: int
    tune: dict[Point, list[Job]] = field(default_factory=dict)
    final: list[Job] = field(default_factory=list)
    choice: Choice | None = None
    extended: int = 0

    @cached_property
    def later(self) -> list[Job]:
        """The final runs if the first point is chosen, which stand for those of the choice before it is made."""
        points = self.cell.points
        return self.cell.final_of(Choice(points[0], (0.0,), dict.fromkeys(points, (0.0,)))) if points else []


class Schedule:
    """The runs of a comparison, in order. Their folders say what is done already.

    Args:
        cells: What is tuned alone.
        score: Of a tuning run's metrics; lower is better.
        retry_failed: Run again what failed earlier.
        skip_failed: Choose without failed tuning runs; else they hold the choice up.

    Attributes:
        running: Jobs under way, by id.
        rows: All jobs so far, by id.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        score: Callable[[Mapping[str, Any]], Score],
        *,
        retry_failed: bool = False,
        skip_failed: bool = False,
    ) -> None:
        self._score = score
        self._retry_failed = retry_failed
        self._skip_failed = skip_failed
        self.rows: dict[str, Row] = {}
        self.running: dict[str, Job] = {}
        self._cell_of: dict[str, CellState] = {}
        self._queue: list[tuple[tuple[bool, int, int, int], str]] = []
        self._computing: dict[str, str] = {}
        self.cells = [CellState(cell, place) for place, cell in enumerate(cells)]
        for state in self.cells:
            for point in state.cell.points if state.cell.given is None else ():
                self._tune(state, point)
        for state in self.cells:
            self._advance(state)

    def counts(self) -> Counter[str]:
        """Runs per status; under ``"later"`` the final runs whose tuning is not complete."""
        counter = Counter(str(row.status) for row in self.rows.values())
        counter["later"] = sum(len(state.later) for state in self.cells if state.choice is None)
        return counter

    def later(self) -> list[Job]:
        """Final runs of cells whose choice is not made: those of the first point, to have their number and cost."""
        return [job for state in self.cells if state.choice is None for job in state.later]

    def held_up(self) -> list[Cell]:
        """Cells whose choice waits for failed tuning runs, and for nothing else."""
        return [
            state.cell
            for state in self.cells
            if state.choice is None and self._statuses(state) <= {"done", "failed"} and not self._skip_failed
        ]

    def without_choice(self) -> list[Cell]:
        """Cells whose tuning is over, with no point to choose: every one failed or diverged."""
        return [state.cell for state in self.cells if state.choice is None and self._is_tuned(state)]

    def choices(self) -> dict[str, Choice]:
        """What was chosen so far, by the names of cells."""
        return {state.cell.name: state.choice for state in self.cells if state.choice is not None}

    def with_status(self, status: Status) -> list[Row]:
        """Jobs of a status: cell by cell, tuning before final runs."""
        jobs = (job for state in self.cells for job in (*chain(*state.tune.values()), *state.final))
        return [row for row in map(self._row, jobs) if row.status == status]

    def claim(self) -> Job | None:
        """The next job, running from now on; None where there is nothing to start at the moment.

        A job that would only wait for something that another one computes for both is passed over.
        """
        for index, (_, id_) in enumerate(self._queue):
            job = self.rows[id_].job
            if job.shared is not None and not job.shared.exists():
                if job.shared.path in self._computing.values():
                    continue
                self._computing[id_] = job.shared.path
            del self._queue[index]
            self.rows[id_].status = "running"
            self.running[id_] = job
            return job
        return None

    def record(self, outcome: Outcome) -> Status:
        """Take down how a running job ended, and what follows from it; returns its new status."""
        job = self.running.pop(outcome.id)
        self._computing.pop(outcome.id, None)
        row = self.rows[outcome.id]
        if outcome.kind == "done":
            row.status, row.metrics = "done", outcome.metrics
        elif outcome.kind == "failed":
            row.status, row.error = "failed", outcome.error or "no traceback"
        else:
            row.deaths += outcome.kind == "died"
            row.status = "pending"
            if row.deaths >= MOST_DEATHS:
                row.status = "failed"
                row.error = f"{row.deaths} worker processes ended in this run, the last one thus: {outcome.error}"
                job.folder.fail(row.error)
            else:
                self._enqueue(job)
        self._advance(self._cell_of[outcome.id])
        return row.status

    def _tune(self, state: CellState, point: Point) -> None:
        state.tune[point] = state.cell.tune(point)
        self._take_up(state, state.tune[point])

    def _advance(self, state: CellState) -> None:
        """Extend the grid of a cell whose tuning is complete, or choose and put its final runs first in line."""
        while state.choice is None and self._is_tuned(state):
            scores = self._scores(state)
            runs = max(map(len, state.tune.values()), default=0)
            following = beyond(mean_scores(scores, runs), state.cell.ladder)
            if state.extended < state.cell.extend and following is not None and following not in state.tune:
                state.extended += 1
                self._tune(state, following)
                continue
            given = state.cell.given
            state.choice = choose(scores, runs) if given is None else Choice(given, (), {})
            if state.choice is None:
                return
            state.final = state.cell.final_of(state.choice)
            self._take_up(state, state.final)

    def _take_up(self, state: CellState, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if job.id in self.rows:
                raise ValueError(f"two jobs have the same settings: {job} and {self.rows[job.id].job}")
            row = self.rows[job.id] = self._found(job)
            self._cell_of[job.id] = state
            if row.status == "pending":
                self._enqueue(job)

    def _found(self, job: Job) -> Row:
        """A job as its folder says it is."""
        folder = job.folder
        metrics = folder.result()
        if metrics is not None:
            return Row(job, "done", metrics)
        error = None if self._retry_failed else folder.error()
        return Row(job, "pending" if error is None else "failed", error=error)

    def _enqueue(self, job: Job) -> None:
        state = self._cell_of[job.id]
        same = state.final if job.phase == "final" else list(chain(*state.tune.values()))
        place = next(index for index, other in enumerate(same) if other.id == job.id)
        insort(self._queue, ((job.phase == "tune", job.order, state.place, place), job.id))

    def _is_tuned(self, state: CellState) -> bool:
        return self._statuses(state) <= ({"done", "failed"} if self._skip_failed else {"done"})

    def _statuses(self, state: CellState) -> set[str]:
        return {self.rows[job.id].status for job in chain(*state.tune.values())}

    def _scores(self, state: CellState) -> dict[Point, list[Score]]:
        return {
            point: [_score(self._score, row.metrics) for row in map(self._row, jobs) if row.metrics is not None]
            for point, jobs in state.tune.items()
        }

    def _row(self, job: Job) -> Row:
        return self.rows[job.id]


def _score(score: Callable[[Mapping[str, Any]], Score], metrics: Mapping[str, Any]) -> Score:
    """Of a run that diverged the worst, whatever else it came to: chance is an accuracy too."""
    found = score(metrics)
    return (math.inf,) * len(found) if metrics.get("diverged") else found
