"""Where runs happen: one small protocol, and the two things that keep it: processes of this machine, and Ray."""

from __future__ import annotations

from typing import Protocol

from experiments.vtab.jobs import Job
from experiments.vtab.worker import Outcome, WorkerOptions

BACKENDS = ("local", "ray")


class Backend(Protocol):
    """Takes jobs and gives outcomes, in any order."""

    @property
    def slots(self) -> int:
        """Jobs it can run at the same time; may change while it works."""
        ...

    def submit(self, job: Job) -> None:
        """Start `job`; only while fewer than :attr:`slots` jobs are under way."""
        ...

    def poll(self, seconds: float) -> list[Outcome]:
        """Outcomes since the last call; waits for the first one, but no longer than `seconds`."""
        ...

    def close(self) -> None:
        """End all processes at once, also those that are in the middle of a run."""
        ...

    def describe(self) -> str:
        """What runs where, in one phrase."""
        ...


def open_backend(
    name: str,
    options: WorkerOptions,
    *,
    workers: int | None,
    gpus_per_run: float | None,
    cpus_per_run: float,
    address: str | None,
    log_folder: str,
) -> Backend:
    """The backend called `name`.

    Args:
        name: ``"local"`` or ``"ray"``.
        options: For its processes.
        workers: Most runs at the same time; None for as many as there is room for.
        gpus_per_run: Share of a GPU for each run; None for a whole one where there is any.
        cpus_per_run: CPU cores for each run.
        address: Of a running Ray cluster.
        log_folder: For what local processes print.

    Raises:
        InputError: Ray is not installed, or there is no room for a single run.
        UnreachableError: No Ray cluster answers at `address`.
    """
    if name == "local":
        from experiments.vtab.backend_local import LocalBackend

        return LocalBackend(options, workers, gpus_per_run, cpus_per_run, log_folder)
    from experiments.vtab.backend_ray import RayBackend

    return RayBackend(options, workers, gpus_per_run, cpus_per_run, address)
