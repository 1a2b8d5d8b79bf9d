"""How long a step takes here, for ``--plan``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread of torch, as in a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_seconds(module: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Seconds per optimizer step of `module`, whose `loss` is computed for one batch."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return median_seconds(step)


def median_seconds(call: Callable[[], object], times: int = 8, warm_up: int = 2) -> float:
    """Median processor seconds of a call in one thread of this process: what else the machine does counts little."""
    found = []
    with single_thread():
        for _ in range(times):
            started = time.process_time()
            call()
            found.append(time.process_time() - started)
    return statistics.median(found[warm_up:])
