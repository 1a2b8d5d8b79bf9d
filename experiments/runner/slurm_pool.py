"""Runs as array jobs of a SLURM cluster, by submitit.

The process that waits may end, be killed and be started again: array jobs that are under way go on (Ctrl-C cancels
them), what they finish lies in its folder, and a run that is submitted a second time waits for the lock of its folder.
Every machine needs this checkout and the data at the same path, and the output folder must be one that they share.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError
from experiments.runner.jobs import Job, Outcome, prepared_attempt
from experiments.runner.options import RunnerOptions
from experiments.runner.worker import WorkerOptions, import_backend

#: Jobs under way where `workers` does not say otherwise; clusters limit the size of an array to about 1,000.
MOST_JOBS = 1000
_NAMES = {"partition": "slurm_partition", "time": "slurm_time", "memory": "slurm_mem"}
_POLL_SECONDS = 1.0


class SlurmPool:
    """Array jobs; each run is one job of an array.

    Args:
        worker: For the processes.
        options: Runs at a time, GPUs and CPUs per run, and `slurm`: what else to ask for. There ``cluster=local`` runs
            the jobs as processes of this machine, to try it out.
        folder: For submitit's own files and what jobs print.

    Raises:
        InputError: submitit or SLURM is not installed, or does not know an option.
    """

    def __init__(self, worker: WorkerOptions, options: RunnerOptions, folder: Path) -> None:
        self._submitit = import_submitit()
        self._worker = worker
        self._folder = folder
        self.slots = options.workers or MOST_JOBS
        self._new: list[Job] = []
        self._submitted: dict[str, Any] = {}
        asked = dict(options.slurm or {})
        cluster = asked.pop("cluster", "slurm")
        try:
            self._executor = self._submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**_parameters(options, worker, asked))
        except (RuntimeError, NameError, ValueError) as error:
            raise InputError(f"slurm: {' '.join(str(error).split())}", setting="slurm") from error
        self._cluster = cluster

    def describe(self) -> str:
        cluster, threads = self._cluster, self._worker.threads
        return f"array jobs of {cluster}, at most {self.slots} runs at a time, {threads} CPU threads each"

    def submit(self, job: Job) -> None:
        """Keep `job` for the next array, which :meth:`poll` submits."""
        self._new.append(job)

    def poll(self, seconds: float) -> list[Outcome]:
        self._submit_new()
        until = time.monotonic() + seconds
        while True:
            over = [id_ for id_, job in self._submitted.items() if job.done()]
            if over or time.monotonic() >= until:
                return [self._outcome(id_, self._submitted.pop(id_)) for id_ in over]
            time.sleep(min(_POLL_SECONDS, max(0.0, until - time.monotonic())))

    def close(self) -> None:
        for job in self._submitted.values():
            job.cancel(check=False)
        self._submitted.clear()
        self._new.clear()

    def _submit_new(self) -> None:
        if not self._new:
            return
        with self._executor.batch():
            handles = [self._executor.submit(prepared_attempt, job, self._worker) for job in self._new]
        self._submitted |= {job.id: handle for job, handle in zip(self._new, handles, strict=True)}
        self._new.clear()

    def _outcome(self, id_: str, handle: Any) -> Outcome:
        errors = self._submitit.core.utils
        try:
            outcome: Outcome = handle.result()
        except errors.FailedJobError as error:
            return Outcome(id_, "failed", error=str(error))
        except errors.UncompletedJobError as error:
            lines = str(error).strip().splitlines() or ["no reason"]
            return Outcome(id_, "died", error=f"{handle.state}: {lines[0][:300]}")
        return outcome


def _parameters(options: RunnerOptions, worker: WorkerOptions, asked: dict[str, str]) -> dict[str, Any]:
    # where this process waits there may be none, so the runs' GPUs cannot be counted here
    gpus = 1.0 if options.gpu_share is None else options.gpu_share
    if gpus != int(gpus):
        raise InputError(
            f"gpus_per_run must be a whole number with --backend slurm, got {gpus:g}", setting="gpus_per_run"
        )
    known = {_NAMES[name]: value for name, value in asked.items() if name in _NAMES}
    more = {name: value for name, value in asked.items() if name not in _NAMES}
    return {
        "name": "eva",
        "cpus_per_task": max(1, worker.threads),
        "gpus_per_node": int(gpus),
        "slurm_array_parallelism": options.workers or MOST_JOBS,
        **known,
        **({"slurm_additional_parameters": more} if more else {}),
    }


def import_submitit() -> Any:
    """The package.

    Raises:
        InputError: It is not installed.
    """
    return import_backend("slurm", "submitit", "slurm", "core.utils")
