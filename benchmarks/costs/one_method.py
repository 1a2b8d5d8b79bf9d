"""The measurement of one method, in a process of its own: ``python -m benchmarks.costs.one_method < SETTINGS``."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L
import torch

from benchmarks.costs.settings import OneMethod
from benchmarks.harness import bare_trainer, quiet
from benchmarks.initialisation.memory import peak_resident, reset_resident
from eva_lightning.errors import InputError
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.registry import MethodKey
from experiments.analysis.sources import Source, open_source
from experiments.runner.cli import sentence
from experiments.runner.lightning_runs import on_gpu


class Memory(NamedTuple):
    """How the most memory in use since some moment is read, in bytes."""

    reset: Callable[[], None]
    peak: Callable[[], int]

    @classmethod
    def of(cls, gpu: bool) -> Memory:
        """Of this process's resident set, or of what torch holds on the GPU."""
        if gpu:
            return cls(torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated)
        return cls(reset_resident, peak_resident)


class Clock(L.Callback):
    """Before all others or after them: when it is called; the last one also times training steps."""

    def __init__(self, memory: Memory, gpu: bool) -> None:
        self.memory, self.gpu = memory, gpu
        self.at: dict[str, float] = {}
        self.steps: list[float] = []
        self.peak_before_training = 0

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.at["setup"] = self._now()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at["on_fit_start"] = self._now()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at["on_train_start"] = self._now()
        self.peak_before_training = self.memory.peak()
        self.memory.reset()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps.append(self._now())


def measure(settings: OneMethod) -> dict[str, list[float]]:
    """Seconds of preparation and of a step, and peak bytes of both beyond the module at rest, once per repetition."""
    source, rows = open_source(settings.analysis), []
    for number in range(settings.repeats + 1):
        row = _once(settings, source)
        if number:  # the first one imports PEFT and makes the libraries' workspaces
            rows.append(row)
    return {name: [row[name] for row in rows] for name in rows[0]}


def _once(settings: OneMethod, source: Source) -> dict[str, float]:
    key, gpu = MethodKey.parse(settings.method), on_gpu(settings.accelerator) and settings.analysis.source != "digits"
    L.seed_everything(0, verbose=False)
    tuning = source.tuning(0, settings.batch_size)
    tuning.data.setup("fit")
    tuning.module.to("cuda" if gpu else "cpu")
    memory = Memory.of(gpu)
    first, last = Clock(memory, gpu), Clock(memory, gpu)
    gc.collect()
    memory.reset()
    at_rest = memory.peak()
    options = AdapterOptions(rank=settings.rank, rho=key.rho or 1.0, bias=tuning.bias, max_batches=settings.max_batches)
    started = first._now()
    callbacks = apply_method(key.method, tuning.module, options, exclude=tuning.exclude or None, mask_fn=source.mask_fn)
    seconds = first._now() - started
    for callback in callbacks:
        if hasattr(callback, "verbose"):
            callback.verbose = False
    trainer = bare_trainer(
        accelerator="gpu" if gpu else "cpu", max_steps=settings.steps, callbacks=[first, *callbacks, last]
    )
    trainer.fit(tuning.module, tuning.data)
    seconds += sum(last.at[hook] - first.at[hook] for hook in first.at)
    steps = sorted(b - a for a, b in zip(last.steps, last.steps[1:], strict=False))
    return {
        "seconds": seconds,
        "step_seconds": steps[len(steps) // 2],
        "bytes": float(last.peak_before_training - at_rest),
        "step_bytes": float(memory.peak() - at_rest),
    }


def main() -> int:
    """Read settings as JSON, print the figures as JSON; 2 and one sentence where the method cannot be had here."""
    given = json.load(sys.stdin)
    torch.set_num_threads(given.pop("threads"))
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    settings = OneMethod(**values)
    try:
        with quiet():
            print(json.dumps(measure(settings)))
    except InputError as error:
        print(sentence(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
