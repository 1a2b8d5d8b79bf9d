"""What to run next: the tuning of every task and method, its final runs as soon as its own tuning is complete."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eva_lightning.methods.keys import MethodKey
from experiments.vtab.grid import Choice, choose
from experiments.vtab.jobs import Job
from experiments.vtab.states import SharedState
from experiments.vtab.store import ResultsStore
from experiments.vtab.store_writer import StoreWriter
from experiments.vtab.sweep_settings import Settings
from experiments.vtab.worker import Outcome


@dataclass
class Cell:
    """A task and a method: tuned together, for one choice of learning rate and rank.

    Attributes:
        tune: The runs of the grid.
        final: The runs of the choice; empty before it is made.
        choice: What tuning came to.
    """

    task: str
    key: MethodKey
    tune: list[Job]
    final: list[Job] = field(default_factory=list)
    choice: Choice | None = None

    def __str__(self) -> str:
        return f"{self.task}, {self.key}"


def cells(settings: Settings) -> list[Cell]:
    """All tasks and methods of a sweep with their tuning runs, task by task."""
    grid = settings.search
    return [
        Cell(
            task,
            key,
            [
                Job.of(settings.base, key, task, "tune", point, seed, settings.components(key))
                for point in grid.points(key.adapts)
                for seed in grid.tune_seeds
            ],
        )
        for task in settings.task_names
        for key in settings.keys
    ]


class Schedule:
    """The runs of a sweep, in the store and in order; the store's holder alone has one.

    Args:
        settings: The sweep.
        store: The store, held.

    Attributes:
        cells: Tasks and methods.
        running: Jobs under way, by run_id.
    """

    def __init__(self, settings: Settings, store: StoreWriter) -> None:
        self._settings = settings
        self._store = store
        self.cells = cells(settings)
        self.running: dict[str, Job] = {}
        self._jobs: dict[str, Job] = {}
        self._cell_of: dict[str, Cell] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._places = {id(cell): place for place, cell in enumerate(self.cells)}
        self._queue: list[tuple[tuple[bool, int, int], str]] = []
        self._computing: dict[str, Path] = {}
        store.add(job.row() for cell in self.cells for job in cell.tune)
        self._known = known_rows(store)
        for cell in self.cells:
            self._take_up(cell, cell.tune)
        for cell in self.cells:
            self._choose(cell)

    def status(self, job: Job) -> str:
        """The status of the job's row."""
        return str(self._rows[job.run_id]["status"])

    def row(self, job: Job) -> dict[str, Any]:
        """The job's row, without the large columns."""
        return self._rows[job.run_id]

    def counts(self) -> Counter[str]:
        """Runs per status; under ``"later"`` the final runs whose tuning is not complete."""
        counter = Counter(self.status(job) for job in self._jobs.values())
        counter["later"] = len(self._settings.search.final_seeds) * sum(not cell.final for cell in self.cells)
        return counter

    def held_up(self) -> list[Cell]:
        """Tasks and methods whose choice waits for failed tuning runs, and for nothing else."""
        return [cell for cell in self.cells if cell.choice is None and self._statuses(cell) <= {"done", "failed"}]

    def failures(self) -> Iterator[tuple[Job, str]]:
        """Failed runs with their tracebacks."""
        for job in self._jobs.values():
            if self.status(job) == "failed":
                yield job, str(self._rows[job.run_id]["error"])

    def claim(self) -> Job | None:
        """The next job, now running in the store; None where there is nothing to start at the moment.

        A job that would only wait for an EVA state that another one is computing is passed over.
        """
        for index, (_, run_id) in enumerate(self._queue):
            job = self._jobs[run_id]
            shared = SharedState.of(job)
            if shared is not None and shared.find() is None:
                if shared.path in self._computing.values():
                    continue
                self._computing[run_id] = shared.path
            del self._queue[index]
            if not self._store.claim(run_id):
                raise RuntimeError(f"run {run_id} ({job}) is not pending in {self._store.path}")
            self._rows[run_id]["status"] = "running"
            self.running[run_id] = job
            return job
        return None

    def record(self, outcome: Outcome) -> str:
        """Write what came of a running job to the store, and what follows from it; returns the row's new status."""
        job = self.running.pop(outcome.run_id)
        self._computing.pop(outcome.run_id, None)
        row = self._rows[outcome.run_id]
        if outcome.kind == "done":
            assert outcome.metrics is not None
            self._store.finish(outcome.run_id, outcome.metrics)
        elif outcome.kind == "failed":
            self._store.fail(outcome.run_id, outcome.error or "no traceback")
        elif self._store.release(outcome.run_id, died=outcome.error if outcome.kind == "died" else None):
            self._enqueue(job)
        (found,) = self._store.rows(superseded=True, details=False, run_id=outcome.run_id)
        row.update(found)
        self._choose(self._cell_of[outcome.run_id])
        return str(row["status"])

    def release_all(self) -> None:
        """Give up all running jobs: pending again."""
        for run_id in list(self.running):
            self._store.release(run_id)
            self._rows[run_id]["status"] = "pending"
            self._enqueue(self.running.pop(run_id))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of this sweep, complete."""
        wanted = set(self._jobs)
        return [row for row in self._store.rows() if row["run_id"] in wanted]

    def _choose(self, cell: Cell) -> None:
        """Make the choice of a cell whose tuning is complete, and put its final runs first in line."""
        if cell.choice is not None:
            return
        if self._statuses(cell) - ({"done", "failed"} if self._settings.skip_failed else {"done"}):
            return
        cell.choice = choice_of(cell, [self._rows[job.run_id] for job in cell.tune], self._settings)
        if cell.choice is None or not self._settings.search.final_seeds:
            return
        cell.final = final_jobs(cell, cell.choice, self._settings)
        self._store.add(job.row() for job in cell.final)
        # seeds that this sweep does not ask for are results of the same choice, and count on
        first = cell.final[0].row()
        place = {name: first[name] for name in ("experiment", "task", "method", "phase", "lr", "rank")}
        same = self._store.rows(superseded=True, details=False, **place)
        self._store.supersede(first["experiment"], cell.task, cell.key.key, [row["run_id"] for row in same])
        self._known |= known_rows(self._store, task=cell.task, method=cell.key.key, phase="final")
        self._take_up(cell, cell.final)

    def _take_up(self, cell: Cell, jobs: Iterable[Job]) -> None:
        """Make jobs with rows part of the schedule; what failed in an earlier session is retried if that is wanted."""
        for job in jobs:
            row = self._rows[job.run_id] = self._known[job.run_id]
            self._jobs[job.run_id] = job
            self._cell_of[job.run_id] = cell
            if row["status"] == "failed" and self._settings.retry_failed and self._store.retry([job.run_id]):
                row |= {"status": "pending", "error": None}
            if row["status"] == "pending":
                self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        """Put a pending job in line: final runs first, then task by task and method by method."""
        cell = self._cell_of[job.run_id]
        jobs = cell.tune if job.phase == "tune" else cell.final
        place = (job.phase == "tune", self._places[id(cell)], jobs.index(job))
        insort(self._queue, (place, job.run_id))

    def _statuses(self, cell: Cell) -> set[str]:
        return {self.status(job) for job in cell.tune}


def choice_of(cell: Cell, rows: Iterable[dict[str, Any]], settings: Settings) -> Choice | None:
    """The choice of a cell by its tuning `rows`."""
    return choose(rows, settings.search.points(cell.key.adapts), len(settings.search.tune_seeds))


def final_jobs(cell: Cell, choice: Choice, settings: Settings) -> list[Job]:
    """The final runs of a choice."""
    return [
        Job.of(settings.base, cell.key, cell.task, "final", choice.point, seed, settings.components(cell.key))
        for seed in settings.search.final_seeds
    ]


def known_rows(store: ResultsStore, **equals: Any) -> dict[str, dict[str, Any]]:
    """Rows by run_id, without the large columns."""
    return {row["run_id"]: row for row in store.rows(superseded=True, details=False, **equals)}
