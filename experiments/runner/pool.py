"""Where runs happen: one small protocol, and the four things that keep it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from experiments.runner.jobs import Job, Outcome
from experiments.runner.local_pool import InlinePool, LocalPool
from experiments.runner.options import RunnerOptions
from experiments.runner.ray_pool import RayPool, import_ray
from experiments.runner.slurm_pool import SlurmPool, import_submitit
from experiments.runner.worker import WorkerOptions


class Pool(Protocol):
    """Takes jobs and gives outcomes, in any order."""

    @property
    def slots(self) -> int:
        """Jobs it takes at the same time; may change while it works."""
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


def check_pool(options: RunnerOptions) -> None:
    """Make sure that the packages are there, before anything that takes time.

    Raises:
        InputError: One is not installed.
    """
    if options.backend == "ray":
        import_ray(options.ray_address)
    elif options.backend == "slurm":
        import_submitit()


def open_pool(options: RunnerOptions, worker: WorkerOptions) -> Pool:
    """The pool that `options` ask for.

    Raises:
        InputError: A package is not installed, or there is no room for a single run.
        UnreachableError: No Ray cluster answers.
    """
    if options.backend == "ray":
        return RayPool(worker, options.workers, options.gpu_share, options.cpus_per_run, options.ray_address)
    if options.backend == "slurm":
        return SlurmPool(worker, options, Path(options.output) / "slurm")
    if options.workers == 0:
        return InlinePool(worker)
    return LocalPool(worker, options.workers, options.gpu_share, Path(options.output) / "workers")
