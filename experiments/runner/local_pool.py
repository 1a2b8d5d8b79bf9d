"""Runs on this machine: in processes with a pipe each, or in this process. Needs nothing but Python.

Every process has one job at most, and a pipe of its own: when it dies, it is known at once which job it took with it,
and the others do not notice. (An executor of the standard library gives up as a whole.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError
from eva_lightning.processes import Worker, start_worker
from experiments.runner.jobs import Job, Outcome, attempt
from experiments.runner.worker import WorkerOptions, prepare


class InlinePool:
    """Runs in this process, one after another.

    Args:
        options: Threads and imports.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.slots = 1
        self._waiting: list[Job] = []
        prepare(options)

    def describe(self) -> str:
        return "in this process"

    def submit(self, job: Job) -> None:
        """Keep `job` for the next :meth:`poll`."""
        self._waiting.append(job)

    def poll(self, seconds: float) -> list[Outcome]:
        return [attempt(self._waiting.pop())] if self._waiting else []

    def close(self) -> None:
        self._waiting.clear()


@dataclass
class _Busy:
    """A process and the job it has."""

    worker: Worker
    job: Job | None = None


class LocalPool:
    """Spawned processes, shared out over the GPUs there are.

    Args:
        options: For the processes.
        workers: How many; None for one per share of a GPU, or per four CPU cores where there is no GPU.
        gpus_per_run: Share of a GPU for each, at most 1; None for a whole one.
        log_folder: What processes print goes to ``worker-N.log`` in it.
        gpus: Devices as CUDA_VISIBLE_DEVICES names them; found out for None.
    """

    def __init__(
        self,
        options: WorkerOptions,
        workers: int | None,
        gpus_per_run: float | None,
        log_folder: Path,
        gpus: Sequence[str] | None = None,
    ) -> None:
        share = 1.0 if gpus_per_run is None else gpus_per_run
        if not 0 <= share <= 1:
            raise InputError(
                f"gpus_per_run must be a share of one GPU, from 0 to 1, with the local backend, got {share}",
                setting="gpus_per_run",
            )
        self._gpus = list((visible_gpus() if gpus is None else gpus) if share > 0 else [])
        self.slots = workers or default_workers(len(self._gpus), share)
        self._options = options
        self._log_folder = log_folder
        self._workers: dict[int, _Busy] = {}

    def describe(self) -> str:
        where = f"{len(self._gpus)} GPUs" if self._gpus else "CPU"
        plural = "" if self.slots == 1 else "es"
        return f"{self.slots} process{plural} on {where}, {self._options.threads} CPU threads each"

    def submit(self, job: Job) -> None:
        """Give `job` to an idle process, or to a new one in place of one that died."""
        number = next(number for number in range(self.slots) if not self._is_busy(number))
        busy = self._workers.get(number)
        if busy is None or not busy.worker.process.is_alive():
            busy = self._workers[number] = _Busy(self._start(number))
        busy.job = job
        # where it has died this very moment, poll finds out
        with contextlib.suppress(OSError):
            busy.worker.pipe.send(job)

    def poll(self, seconds: float) -> list[Outcome]:
        numbers: dict[Any, int] = {}
        for number, busy in self._workers.items():
            if busy.job is not None:
                numbers[busy.worker.pipe] = numbers[busy.worker.process.sentinel] = number
        ready = {numbers[thing] for thing in wait(list(numbers), timeout=seconds)}
        return [self._collect(number) for number in sorted(ready)]

    def close(self) -> None:
        for busy in self._workers.values():
            busy.worker.end()
        self._workers.clear()

    def _is_busy(self, number: int) -> bool:
        return number in self._workers and self._workers[number].job is not None

    def _collect(self, number: int) -> Outcome:
        busy = self._workers[number]
        assert busy.job is not None
        id_, busy.job = busy.job.id, None
        # also from a process that died after it had sent it
        with contextlib.suppress(EOFError, OSError):
            if busy.worker.pipe.poll(0):
                answer = busy.worker.pipe.recv()
                if isinstance(answer, Outcome):
                    return answer
                raise RuntimeError(f"worker process {number} cannot start:\n{answer}")
        del self._workers[number]
        text = busy.worker.exit_text()
        busy.worker.end()
        return Outcome(id_, "died", error=text)

    def _start(self, number: int) -> Worker:
        self._log_folder.mkdir(parents=True, exist_ok=True)
        log = self._log_folder / f"worker-{number}.log"
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[number % len(self._gpus)]} if self._gpus else None
        return start_worker(
            _serve, self._options, str(log), threads=self._options.threads, environment=gpu, name=f"worker-{number}"
        )


def visible_gpus() -> list[str]:
    """GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; only those that it allows where it is set."""
    import torch  # a command that only prints its help should not wait for it

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def default_workers(gpus: int, share: float) -> int:
    """As many runs as the GPUs have room for; without any, one per four CPU cores."""
    if gpus:
        return max(1, gpus * math.floor(1 / share + 1e-9))
    return max(1, (os.cpu_count() or 1) // 4)


def _serve(pipe: Connection, options: WorkerOptions, log: str) -> None:
    """A worker process: jobs in, outcomes out, until the pipe closes."""
    with Path(log).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    try:
        prepare(options)
    except Exception:
        pipe.send(traceback.format_exc())
        return
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(job))
