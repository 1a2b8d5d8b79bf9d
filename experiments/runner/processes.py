"""A pool of processes that a demo can be interrupted in at any moment."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from experiments.demo_runs import quiet


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(modules: Sequence[str]) -> None:
    # A parent that is killed cannot end its processes, and they would wait for work, or do it, for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Imported while the parent is still busy with something else, so that no run's timing contains it.
    with quiet():
        for name in modules:
            importlib.import_module(name)


def _nothing() -> None:
    """A task that makes the pool start its processes."""


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    # Processes started meanwhile inherit the setting: Ctrl-C then reaches the parent alone, which lets them finish.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def worker_pool(n: int, modules: Sequence[str] = ("peft",)) -> Iterator[ProcessPoolExecutor | None]:
    """``n`` spawned processes that have imported ``modules``, or None for ``n=0``.

    On an error or Ctrl-C they are ended at once: results are written by atomic replacement, so nothing half-made stays.
    """
    if n == 0:
        yield None
        return
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n, mp_context=context, initializer=_start_worker, initargs=(tuple(modules),))
    try:
        with _interrupts_ignored():
            for _ in range(n):
                pool.submit(_nothing)
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True)
