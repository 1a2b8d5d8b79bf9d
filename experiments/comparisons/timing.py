"""How long a step takes here, for ``--plan``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread of torch, as in a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def median_seconds(call: Callable[[], object], times: int = 8, warm_up: int = 2) -> float:
    """Median processor seconds of a call in this process, so that what else the machine does counts little."""
    found = []
    for _ in range(times):
        started = time.process_time()
        call()
        found.append(time.process_time() - started)
    return statistics.median(found[warm_up:])
