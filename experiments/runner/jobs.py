"""One run of a comparison: what it does, where, and how it ended."""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from eva_lightning.errors import InputError
from eva_lightning.files import digest, free_bytes, is_disk_full
from experiments.runner.run_folder import RunFolder, Work, perform
from experiments.runner.settings import identity
from experiments.runner.worker import WorkerOptions, free_memory, prepare

Phase = Literal["tune", "final"]

#: Phase -> folder in OUTPUT for its runs.
PHASE_FOLDERS: dict[Phase, str] = {"tune": "tuning", "final": "runs"}
_LEAST_ROOM = 2**20


@dataclass(frozen=True)
class Point:
    """Settings that are tuned, by name: ``Point.of(lr=1e-3, rank=4)``."""

    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, **values: Any) -> Point:
        """A point; values that are None are left out."""
        return cls(tuple((name, value) for name, value in values.items() if value is not None))

    def get(self, name: str, default: Any = None) -> Any:
        """The value called `name`."""
        return dict(self.values).get(name, default)

    def replace(self, **values: Any) -> Point:
        """The same point, but for these values."""
        return Point.of(**{**self.as_dict(), **values})

    def as_dict(self) -> dict[str, Any]:
        """Values by name."""
        return dict(self.values)

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.values
        )


@dataclass(frozen=True)
class Shared:
    """Something that several jobs need and the first one computes.

    While a job that computes it runs, others that need it are passed over.
    """

    path: str

    def exists(self) -> bool:
        """Whether it is there already."""
        return Path(self.path).exists()


@dataclass(frozen=True)
class Job:
    """One run of a comparison. Travels to other processes, so everything in it can be pickled.

    Attributes:
        build: A function of a module's top level: checks everything, builds, and returns the work to do in the folder.
        settings: A dataclass whose options have roles.
        output: OUTPUT of the comparison.
        phase: ``"tune"`` or ``"final"``.
        tags: How results are grouped: method, task, seed, lr, ... Columns of the results' tables.
        text: One line that tells it from the others.
        shared: What it needs that others need as well.
        order: Jobs of a smaller number come first; among equals cell by cell.
    """

    build: Callable[[Job], Work]
    settings: Any
    output: str
    phase: Phase
    tags: Mapping[str, Any]
    text: str
    shared: Shared | None = None
    order: int = field(default=0, compare=False)

    @cached_property
    def id(self) -> str:
        """16 digits: the same settings in the same phase give the same, on every machine."""
        return digest([self.phase, identity(self.settings)])

    @property
    def path(self) -> Path:
        """Where the run works."""
        readable = re.sub(r"[^\w.+]+", "-", self.text.replace("ρ = ", "rho"), flags=re.ASCII).strip("-")[:100]
        return Path(self.output) / PHASE_FOLDERS[self.phase] / f"{readable}-{self.id[:8]}"

    @property
    def folder(self) -> RunFolder:
        """The run's folder: its one truth."""
        return RunFolder(self.path, self.settings)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        id: The job.
        kind: ``"done"``; ``"failed"``, by an exception of its own; ``"no-room"``, because the disk is full; or
            ``"died"``, with the process that ran it.
        metrics: Of a run that is done.
        error: The traceback, or how the process ended.
    """

    id: str
    kind: Literal["done", "failed", "no-room", "died"]
    metrics: dict[str, Any] | None = None
    error: str | None = None

    @property
    def reason(self) -> str:
        """The last line of the error."""
        lines = (self.error or "").strip().splitlines()
        return lines[-1] if lines else "no reason"


def attempt(job: Job) -> Outcome:
    """Do `job`; whatever goes wrong with it is an outcome, not an exception.

    A folder with ``metrics.json`` is a finished run: its metrics are handed in, and nothing is run twice. Every
    execution leaves a line where it begins and one where it ends in ``OUTPUT/journal.log``.
    """
    outcome = _attempt(job)
    if outcome.kind != "done":
        # of others perform does it; an exception held the run until now
        free_memory()
    return outcome


def _attempt(job: Job) -> Outcome:
    folder = job.folder
    try:
        metrics = folder.result()
        if metrics is None:
            metrics = _execute(job, folder)
        return Outcome(job.id, "done", metrics)
    except Exception as error:
        text = traceback.format_exc()
        if is_disk_full(error) or (not isinstance(error, InputError) and _no_room(job.output)):
            return Outcome(job.id, "no-room", error=text)
        return _failed(job, folder, text)


def prepared_attempt(job: Job, options: WorkerOptions) -> Outcome:
    """:func:`attempt` in a process that may be new."""
    prepare(options)
    return attempt(job)


def _execute(job: Job, folder: RunFolder) -> dict[str, Any]:
    note(job, "begin")
    started = time.perf_counter()

    def build() -> Work:
        work = job.build(job)

        def timed(folder: RunFolder) -> Mapping[str, Any]:
            metrics = work(folder)
            return {"seconds": time.perf_counter() - started, **metrics}

        return timed

    metrics = perform(folder, build, terminal=False)
    note(job, "end")
    folder.clear_checkpoints()
    return metrics


def _failed(job: Job, folder: RunFolder, text: str) -> Outcome:
    try:
        folder.fail(text)
    except (OSError, InputError) as error:
        return Outcome(job.id, "no-room" if is_disk_full(error) else "failed", error=text)
    return Outcome(job.id, "failed", error=text)


def note(job: Job, what: str) -> None:
    """A line in the journal; lines of several processes do not mix."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    line = f"{now} {what} {job.id} process {os.getpid()} on {socket.gethostname()}: {job}\n"
    journal = Path(job.output) / "journal.log"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write(line)


def _no_room(output: str) -> bool:
    """Whether the disk is full: some libraries do not say so."""
    try:
        return free_bytes(output) < _LEAST_ROOM
    except OSError:
        return False
