"""A pool that runs in this process, with nothing behind it."""

from __future__ import annotations

from collections.abc import Callable

from experiments.runner.jobs import Job, Outcome, attempt


class FakePool:
    """Keeps what a pool promises without processes.

    Args:
        work: What to do with a job.
        slots: Jobs taken at a time; they run at the next poll, the last one first.
    """

    def __init__(self, work: Callable[[Job], Outcome] = attempt, slots: int = 1) -> None:
        self.slots = slots
        self.jobs: list[Job] = []
        self.closed = False
        self._waiting: list[Job] = []
        self._work = work

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
