"""One run of the comparison: train, note validation losses, roll out; in this process, without checkpoints.

A run takes a minute at most, so an interrupted one starts over, and nothing but its figures is kept.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, unknown
from experiments.metaworld import finetune
from experiments.metaworld.table import LABELS
from experiments.runner.run_folder import RunFolder

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor


@dataclass(frozen=True)
class Variant:
    """A method as it is compared: with its ρ where it has one.

    Attributes:
        method: Name, as ``finetune --method`` takes it.
        rho: EVA's ρ; None for other methods.
    """

    method: str
    rho: float | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``"lora"`` or ``"eva:2"``.

        Raises:
            InputError: There is no such method, or ρ is missing, superfluous or below 1.
        """
        name, _, rho = text.strip().partition(":")
        if name not in LABELS:
            raise InputError(unknown("method", name, LABELS))
        if ("eva" in name) != bool(rho):
            raise InputError(f"a method is written like eva:2 (with ρ) or lora (without), got {text.strip()!r}")
        try:
            value = float(rho) if rho else None
        except ValueError:
            raise InputError(f"ρ must be a number, got {text.strip()!r}") from None
        if value is not None and not value >= 1:
            raise InputError(f"ρ must be at least 1, got {text.strip()!r}")
        return cls(name, value)

    @property
    def key(self) -> str:
        """How it is written in settings."""
        return self.method if self.rho is None else f"{self.method}:{self.rho:g}"

    @property
    def label(self) -> str:
        """How it is written in tables."""
        return LABELS[self.method] + ("" if self.rho is None else f" ρ={self.rho:g}")


@dataclass(frozen=True)
class Job:
    """One run: a method on a task with a seed.

    Attributes:
        variant: The method.
        seed: Seed of the training.
        settings: Everything else, as ``finetune`` takes it.
    """

    variant: Variant
    seed: int
    settings: finetune.Settings

    @property
    def task(self) -> str:
        """The task."""
        return self.settings.task

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return self.settings.lr

    @property
    def folder(self) -> RunFolder:
        """Where its figures go, and whether they are there."""
        name = f"{self.task}-{self.variant.key.replace(':', '-rho')}-lr{self.lr:g}-seed{self.seed}"
        path = Path(self.settings.output) / name
        return RunFolder(path, self.settings.config(self.task, self.seed), finetune.INCIDENTAL)

    @property
    def text(self) -> str:
        """One line that tells it from the others."""
        return f"{self.task}, {self.variant.label}, lr {self.lr:g}, seed {self.seed}"


def run(job: Job) -> dict[str, Any]:
    """The metrics of a job, also written to its folder.

    Raises:
        MissingInputError, InputError: The checkpoint or the data is missing or wrong.
    """
    import lightning as L

    from eva_lightning.callback import EVAInitCallback
    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.trajectories import TrajectoryDataModule
    from experiments.metaworld.validation import ValidationLosses

    settings, task = job.settings, job.task
    started = time.perf_counter()
    L.seed_everything(job.seed, workers=True, verbose=False)
    overrides = {"lr": job.lr, "min_lr": min(1e-6, job.lr), "weight_decay": settings.weight_decay,
                 "warmup_steps": settings.warmup_steps}  # fmt: skip
    pretrained = DecisionTransformerModule.from_pretrained(settings.init, **overrides)
    data = TrajectoryDataModule(
        settings.data,
        [task],
        context=pretrained.context,
        batch_size=settings.batch_size,
        episodes=settings.train_episodes,
        val_episodes=settings.val_episodes,
        seed=job.seed,
        cache_dir=settings.cache,
    )
    module, callbacks = finetune.prepare(settings, pretrained, job.seed)
    for callback in callbacks:
        if isinstance(callback, EVAInitCallback):
            callback.verbose = False
    job.folder.start()
    losses = ValidationLosses(settings.val_steps)
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        max_steps=settings.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[*callbacks, losses],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    fitting = time.perf_counter()
    trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - fitting
    metrics = finetune.training_metrics(settings, data, module, callbacks, losses, {"seed": job.seed})
    # adapters cost more than half of a rollout's time, and their sum with the weights is the same function
    network = finetune.merged(module)
    metrics |= finetune.measure(settings, task, network, data.max_return[task])
    metrics |= {"variant": job.variant.key, "train_seconds": seconds, "seconds": time.perf_counter() - started}
    job.folder.finish(metrics)
    return metrics


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with metrics, or with what went wrong."""

    job: Job
    metrics: dict[str, Any] | None
    error: str | None = None


def run_all(jobs: Iterable[Job], workers: int, run_one: Callable[[Job], dict[str, Any]] = run) -> Iterator[Outcome]:
    """Run `jobs` in order over processes of one thread each, giving each outcome as it comes.

    A job that fails is an outcome, not an end. However the caller leaves, the processes end.

    Args:
        jobs: What to run.
        workers: Number of processes; 0 for this process.
        run_one: A function of a module's top level.
    """
    todo = list(jobs)
    if workers == 0 or not todo:
        yield from (attempt(job, run_one) for job in todo)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    # fork would copy the simulator's and torch's threads half-dead
    pool = ProcessPoolExecutor(min(workers, len(todo)), multiprocessing.get_context("spawn"), start_worker)
    try:
        for future in as_completed([pool.submit(attempt, job, run_one) for job in todo]):
            yield future.result()
    except BaseException:
        _end(pool)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def attempt(job: Job, run_one: Callable[[Job], dict[str, Any]] = run) -> Outcome:
    """Run a job; what goes wrong is written to its folder and handed back."""
    import traceback

    quiet()
    record = job.folder.path / "error.txt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's, once per run: no loader processes, no logger
            metrics = run_one(job)
    except Exception as error:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(traceback.format_exc(), encoding="utf-8")
        return Outcome(job, None, f"{type(error).__name__}: {error}")
    record.unlink(missing_ok=True)
    return Outcome(job, metrics)


def quiet() -> None:
    """No remarks of Lightning and bitsandbytes on each of the many runs."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_worker() -> None:
    """One thread; ended with its parent, even where that was killed."""
    import torch

    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.terminate()
