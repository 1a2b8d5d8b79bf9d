"""Processes that end with the one that started them, however that ends: an error, Ctrl-C, or ``kill -9``.

All are spawned: a fork would copy the locks of the simulator's, torch's and CUDA's threads without the threads.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")
_STARTED: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


@atexit.register
def _end_started() -> None:
    # multiprocessing would wait for them; as daemons they could have no processes of their own, such as data loaders'
    for process in list(_STARTED):
        process.kill()


@dataclass(frozen=True)
class Worker:
    """A process and this end of the pipe to it.

    Attributes:
        process: Started.
        pipe: Reading raises EOFError once the process has ended, and the process reads EOFError once this is closed.
    """

    process: BaseProcess
    pipe: Connection

    def end(self) -> None:
        """End the process at once, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def exit_text(self) -> str:
        """How the process ended, which is waited for: its exit status, or the signal that killed it."""
        self.process.join()
        status = self.process.exitcode or 0
        if status >= 0:
            return f"ended with exit status {status}"
        known = {int(s): s.name for s in signal.Signals}
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"killed by signal {-status}, {known.get(-status, 'unknown')}{hint}"


def start_worker(
    work: Callable[..., None],
    *arguments: Any,
    threads: int | None = 1,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Worker:
    """Start a process that calls ``work(pipe, *arguments)``.

    Args:
        work: A function of a module's top level.
        arguments: Pickled to the process.
        threads: CPU threads of its numerical libraries; None leaves them their default.
        environment: Environment variables of the process, there before its first import.
        name: Of the process.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_work, args=(work, theirs, arguments), name=name)
    with _inherited(threads, environment):
        process.start()
    _STARTED.add(process)
    # with our copy open, the end of the process would not close the pipe
    theirs.close()
    return Worker(process, ours)


@contextlib.contextmanager
def process_pool(
    workers: int,
    *,
    threads: int | None = 1,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes, all started; ended at once if the block ends with an error or Ctrl-C.

    Work that is under way when the block ends otherwise is waited for, and what has not begun is dropped.

    Args:
        workers: Number of processes.
        threads: CPU threads of each one's numerical libraries; None leaves them their default.
        initializer: Called in each process before its first task, for example to import what tasks need.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, _SPAWN, _initialize, (initializer,))
    try:
        with _inherited(threads, None):
            for _ in range(workers):  # each task starts a process
                pool.submit(_nothing)
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, and leave Ctrl-C to the parent.

    Called first thing in a process that a parent started with :mod:`multiprocessing`: a parent that is killed cannot
    end its processes, and they would work, or wait for work, for ever.
    """
    # a terminal sends Ctrl-C to all processes; the parent decides what becomes of the work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(work: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    work(pipe, *arguments)


def _initialize(initializer: Callable[[], None] | None) -> None:
    end_with_parent()
    if initializer is not None:
        initializer()


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _inherited(threads: int | None, environment: Mapping[str, str] | None) -> Iterator[None]:
    """What processes started in this block inherit: environment variables, and that Ctrl-C is ignored.

    Libraries read the variables when they are imported, which may be before any code of ours runs.
    """
    variables = dict(environment or {})
    if threads is not None:
        variables |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    before = {name: os.environ.get(name) for name in variables}
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if in_main_thread else None
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
