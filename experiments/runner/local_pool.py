"""Runs on this machine: in processes with a pipe each, or in this process. Needs nothing but Python.

Every process has one job at most, and a pipe of its own: when it dies, it is known at once which job it took with it,
and the others do not notice. (An executor of the standard library gives up as a whole.)
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import math
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError
from experiments.runner.jobs import Job, Outcome, attempt
from experiments.runner.worker import WorkerOptions, prepare, set_threads

_SPAWN = multiprocessing.get_context("spawn")


class InlinePool:
    """Runs in this process, one after another.

    Args:
        options: Threads and imports; undone by :meth:`close`.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self.slots = 1
        self._waiting: list[Job] = []
        self._threads = set_threads(options.threads)
        if options.start is not None:
            options.start()
        gc.freeze()

    def describe(self) -> str:
        """What runs where, in one phrase."""
        return "in this process"

    def submit(self, job: Job) -> None:
        """Keep `job` for the next :meth:`poll`."""
        self._waiting.append(job)

    def poll(self, seconds: float) -> list[Outcome]:
        """Run what was submitted."""
        return [attempt(self._waiting.pop())] if self._waiting else []

    def close(self) -> None:
        """Set threads back."""
        gc.unfreeze()
        set_threads(self._threads)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
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
        self._workers: dict[int, _Worker] = {}

    def describe(self) -> str:
        """What runs where, in one phrase."""
        where = f"{len(self._gpus)} GPUs" if self._gpus else "CPU"
        plural = "" if self.slots == 1 else "es"
        return f"{self.slots} process{plural} on {where}, {self._options.threads} CPU threads each"

    def submit(self, job: Job) -> None:
        """Give `job` to an idle process, or to a new one in place of one that died."""
        for number in range(self.slots):
            worker = self._workers.get(number)
            if worker is not None and worker.job is not None:
                continue
            if worker is None or not worker.process.is_alive():
                worker = self._workers[number] = self._start(number)
            worker.job = job
            # where it has died this very moment, poll finds out
            with contextlib.suppress(OSError):
                worker.pipe.send(job)
            return
        raise RuntimeError("every process has a job")

    def poll(self, seconds: float) -> list[Outcome]:
        """Outcomes since the last call."""
        numbers: dict[Any, int] = {}
        for number, worker in self._workers.items():
            if worker.job is not None:
                numbers[worker.pipe] = numbers[worker.process.sentinel] = number
        ready = {numbers[thing] for thing in wait(list(numbers), timeout=seconds)}
        return [self._collect(number) for number in sorted(ready)]

    def close(self) -> None:
        """End all processes at once."""
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()

    def _collect(self, number: int) -> Outcome:
        worker = self._workers[number]
        assert worker.job is not None
        id_, worker.job = worker.job.id, None
        # also from a process that died after it had sent it
        with contextlib.suppress(EOFError, OSError):
            if worker.pipe.poll(0):
                answer = worker.pipe.recv()
                if isinstance(answer, Outcome):
                    return answer
                raise RuntimeError(f"worker process {number} cannot start:\n{answer}")
        del self._workers[number]
        worker.process.join()
        worker.pipe.close()
        return Outcome(id_, "died", error=_ending(worker.process.exitcode))

    def _start(self, number: int) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        self._log_folder.mkdir(parents=True, exist_ok=True)
        log = self._log_folder / f"worker-{number}.log"
        process = _SPAWN.Process(target=_serve, args=(theirs, self._options, str(log)), name=f"worker-{number}")
        threads = str(self._options.threads)
        variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._gpus:
            variables["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        # for the process from its first line on: libraries read them when they are imported
        with _environment(variables):
            process.start()
        theirs.close()
        return _Worker(process, ours)


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


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "unknown"
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"killed by signal {-status}, {name}{hint}"
    return f"ended with exit status {status}"


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, options: WorkerOptions, log: str) -> None:
    """A worker process: jobs in, outcomes out, until the pipe closes."""
    # Ctrl-C is the parent's to handle: it ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
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


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes, and what they do would be for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
