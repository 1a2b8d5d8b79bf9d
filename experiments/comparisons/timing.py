"""How long a step takes here, for ``--plan``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def cost_class(method: str) -> str:
    """The method that stands for `method` in measurements: however LoRA is initialised, its steps cost the same."""
    if method in ("scratch", "fft", "adalora"):
        return method
    return "dora" if "dora" in method else "lora"


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread of torch, as in a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_seconds(module: nn.Module, loss: Callable[[], Tensor], **how: Any) -> float:
    """Seconds per optimizer step of `module`, whose `loss` is computed for one batch; `how` as in
    :func:`median_seconds`."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return median_seconds(step, **how)


def median_seconds(call: Callable[[], object], times: int = 8, warm_up: int = 2, device: str = "cpu") -> float:
    """Median seconds of a call in this process, after `warm_up` of the `times`.

    On the CPU they are the processor's, in one thread: what else the machine does counts little.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    with single_thread():
        for _ in range(times):
            started = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(clock() - started)
    return statistics.median(found[warm_up:])
