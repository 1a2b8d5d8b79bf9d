"""Peak memory of an initialisation over that of the plain forward, on the CPU in a process of its own.

torch's allocations are invisible to ``tracemalloc``, and a process's peak never falls: a fresh process runs the plain
forward first, notes the peak of its resident set, and runs the initialisation after it, a few times.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.initialisation import peft_eva
from benchmarks.initialisation.runner import Runner

# Resident sets differ by tens of MiB from run to run, with what the allocator has kept of the run before.
_ROUNDS = {"ours": 4, "peft": 1}
CPU_METHOD = "peak resident set (VmHWM) of a fresh process, initialisation minus plain forward, median of 3"
CUDA_METHOD = "torch.cuda.max_memory_allocated, initialisation minus plain forward"


def peak_over_forward(runner: Runner, call: str, n_batches: int, **arguments: Any) -> int:
    """Bytes at the peak of one initialisation beyond the peak of the plain forward of `n_batches`.

    Args:
        runner: what to run; on the CPU a fresh process runs a copy.
        call: "ours" or "peft".
        n_batches: minibatches of the plain forward.
        arguments: of the call; plain values.

    Raises:
        RuntimeError: The fresh process failed; the message is its last line.
    """
    if runner.device.type == "cuda":
        return difference_of_peaks(runner, call, n_batches, arguments, _reset_cuda, _peak_cuda)
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.pt"
        torch.save({"runner": runner, "call": call, "n_batches": n_batches, "arguments": arguments}, task)
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "benchmarks.initialisation.memory", str(task), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"measuring the memory of {call} failed: {lines[-1]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def difference_of_peaks(
    runner: Runner,
    call: str,
    n_batches: int,
    arguments: dict[str, Any],
    reset: Callable[[], None],
    peak: Callable[[], int],
) -> int:
    """Median over a few rounds of: peak of the initialisation minus peak of the plain forward, in bytes."""
    runner = replace(runner, batches=list(runner.batches))
    differences = []
    for _ in range(_ROUNDS[call]):
        peaks = []
        for run in (lambda: runner.forward(n_batches), lambda: _initialise(runner, call, arguments)):
            gc.collect()
            reset()
            run()
            peaks.append(peak())
        differences.append(peaks[1] - peaks[0])
    # in the first round the heap still grows with whatever runs
    return int(statistics.median(differences[-3:]))


def _initialise(runner: Runner, call: str, arguments: dict[str, Any]) -> object:
    return runner.ours(**arguments) if call == "ours" else peft_eva.initialise(runner, **arguments)


def _reset_cuda() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def _peak_cuda() -> int:
    return torch.cuda.max_memory_allocated()


def reset_resident() -> None:
    """Start the peak again."""
    # Linux: makes VmHWM start again from what is resident now; elsewhere the peak of the whole process has to do
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="ascii")


def peak_resident() -> int:
    """Most bytes that were resident since then."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    # not ru_maxrss on Linux: it starts at the peak of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _child(task_file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    task = torch.load(task_file, weights_only=False)
    value = difference_of_peaks(
        task["runner"], task["call"], task["n_batches"], task["arguments"], reset_resident, peak_resident
    )
    print(json.dumps(value))


if __name__ == "__main__":
    _child(*sys.argv[1:])
