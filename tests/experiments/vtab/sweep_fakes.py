"""What the tests of the sweep share: tiny data, a command line, and a backend that runs in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.runner.run_folder import RunFolder
from experiments.vtab import run, sweep, worker
from experiments.vtab.jobs import Job
from experiments.vtab.worker import Outcome, WorkerOptions, attempt
from tests.eva_lightning.vision.fakes import make_task

COUNTS = {"train800": 8, "val200": 8, "test": 12}


def make_tasks(root: Path, tasks: Sequence[str] = ("kitti", "dmlab")) -> None:
    """The tasks in miniature."""
    for task in tasks:
        make_task(root, task, {"kitti": 4, "dmlab": 6, "eurosat": 10}[task], size=32, counts=COUNTS)


def words(root: Path, output: Path, extra: str = "") -> list[str]:
    """A command line for tiny runs on a CPU; later options win."""
    text = (
        f"--root {root} --output {output} --model test_vit --weights none --image-size 32 --epochs 1 --batch-size 8 "
        f"--accelerator cpu --threads 1 {extra}"
    )
    return text.split()


class InlineBackend:
    """Runs in this process: the protocol without processes.

    Args:
        work: What to do with a job.
        slots: Jobs taken at a time; they run at the next poll, the last one first.
    """

    def __init__(self, work: Callable[[Job], Outcome] | None = None, slots: int = 1) -> None:
        self.slots = slots
        self.jobs: list[Job] = []
        self.closed = False
        self._waiting: list[Job] = []
        self._work = work or (lambda job: attempt(job, self.options))
        self.options = WorkerOptions()

    def submit(self, job: Job) -> None:
        assert len(self._waiting) < self.slots
        self.jobs.append(job)
        self._waiting.append(job)

    def poll(self, seconds: float) -> list[Outcome]:
        return [self._work(self._waiting.pop())]

    def close(self) -> None:
        self.closed = True

    def describe(self) -> str:
        return "inline"


def inline(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[Job], Outcome] | None = None, slots: int = 1
) -> InlineBackend:
    """Let sweeps of this test run in this process."""
    backend = InlineBackend(work, slots)
    monkeypatch.setattr(sweep, "open_backend", lambda *args, **kwargs: backend)
    # in the test process, everything ever imported would be looked at
    monkeypatch.setattr(worker, "_free_memory", lambda: None)
    return backend


def pretend(accuracy: Callable[[Job], float] = lambda job: 0.5) -> Callable[[Job], Outcome]:
    """Outcomes without training."""

    def work(job: Job) -> Outcome:
        metrics = {"accuracy": accuracy(job), "loss": 1.0, "train_seconds": 0.1, "official_sizes": False}
        return Outcome(job.run_id, "done", metrics)

    return work


def quick(settings: run.Settings, folder: RunFolder, outputs: run.Outputs) -> dict[str, Any]:
    """What ``run.execute`` leaves, without training."""
    digest = hashlib.sha256(repr((settings.method, settings.lr, settings.rank, settings.seed)).encode()).digest()
    metrics = {"accuracy": digest[0] / 255, "loss": 1.0, "train_seconds": 0.1, "official_sizes": False}
    folder.start()
    folder.finish(metrics)
    return metrics
