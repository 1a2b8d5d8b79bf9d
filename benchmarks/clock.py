"""Wall and processor time of work on a device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Wall seconds, and processor seconds of all threads, which other processes on the machine disturb less."""

    wall: float
    cpu: float


class Stopwatch:
    """Wall and processor time; on a GPU the wall time between events in its stream, which is idle at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._event = self._record()
        self._started = time.perf_counter(), time.process_time()

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def read(self) -> Timing:
        """Since the stopwatch was made."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        if self._event is not None:
            end = self._record()
            end.synchronize()
            wall = self._event.elapsed_time(end) / 1e3
        return Timing(wall, cpu)
