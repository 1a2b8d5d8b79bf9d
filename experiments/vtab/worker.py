"""What a worker process does, wherever it runs: prepare once, then attempt one job after another."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from experiments.vtab import run
from experiments.vtab.jobs import Job
from experiments.vtab.states import SharedState

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOISY = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "bitsandbytes", "timm")


@dataclass(frozen=True)
class WorkerOptions:
    """How workers work; nothing of it changes results but `threads`, in the last bits.

    Attributes:
        threads: CPU threads of torch in each process.
        reuse_backbones: Keep the pre-trained model in memory between runs, once per process.
        checkpoint_minutes: Least time between checkpoints of a run.
    """

    threads: int = 1
    reuse_backbones: bool = True
    checkpoint_minutes: float = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        run_id: The job.
        kind: ``"done"``; ``"failed"``, by an exception of its own; ``"no-room"``, because the disk is full; or
            ``"died"``, with the process that ran it.
        metrics: Of a run that is done.
        error: The traceback, or how the process ended.
    """

    run_id: str
    kind: Literal["done", "failed", "no-room", "died"]
    metrics: dict[str, Any] | None = None
    error: str | None = None


_PREPARED: list[WorkerOptions] = []


def prepare(options: WorkerOptions) -> None:
    """Import what every run needs, and settle threads and noise; the second time nothing happens."""
    if _PREPARED:
        return
    _PREPARED.append(options)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning  # noqa: F401 - imported now, so that no run's time contains it
    import peft  # noqa: F401
    import timm  # noqa: F401
    import torch

    from eva_lightning.vision.backbone.backbone_cache import reuse_backbones

    torch.set_num_threads(options.threads)
    reuse_backbones(options.reuse_backbones)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # what is imported stays: collecting garbage after each run need not look at it
    gc.collect()
    gc.freeze()


def attempt(job: Job, options: WorkerOptions) -> Outcome:
    """Run `job`; whatever goes wrong with it is an outcome, not an exception.

    A folder with ``metrics.json`` is a run that was finished, but not recorded before the sweep was killed: its figures
    are handed in, and nothing is run twice. Every execution leaves a line where it begins and one where it ends in
    ``OUTPUT/journal.log``.
    """
    try:
        metrics = job.folder().result()
        if metrics is None:
            _note(job, "begin")
            metrics = _execute(job, options)
            _note(job, "end")
        return Outcome(job.run_id, "done", metrics)
    except Exception as error:
        kind: Literal["failed", "no-room"] = "no-room" if _is_out_of_room(error, job.settings.output) else "failed"
        return Outcome(job.run_id, kind, error=traceback.format_exc())
    finally:
        _free_memory()


def _execute(job: Job, options: WorkerOptions) -> dict[str, Any]:
    started = time.perf_counter()
    folder, settings = job.folder(), job.settings
    shared = SharedState.of(job)
    if shared is not None:
        settings = replace(settings, eva_state=str(shared.obtain()))
        folder.config["eva_state"] = settings.eva_state
    outputs = run.Outputs(
        terminal=False,
        validate=False,
        plots=False,
        adapter=job.phase == "final",
        checkpoint_minutes=options.checkpoint_minutes,
    )
    metrics = run.execute(settings, folder, outputs)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    metrics["seconds"] = time.perf_counter() - started
    if shared is not None:
        metrics["eva_state"] = Path(str(settings.eva_state)).name
    return metrics


def _note(job: Job, what: str) -> None:
    """A line in the journal; lines of several processes do not mix."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    line = f"{now} {what} {job.run_id} process {os.getpid()} on {socket.gethostname()}: {job}\n"
    journal = Path(job.settings.output) / "journal.log"
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write(line)


def _is_out_of_room(error: BaseException | None, output: str) -> bool:
    """Whether the disk is full: some libraries say so in words of their own, or not at all."""
    while error is not None:
        if getattr(error, "errno", None) in _NO_ROOM or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    try:
        return shutil.disk_usage(output).free < 2**20
    except OSError:
        return False


def _free_memory() -> None:
    """Give a run's memory back: a trainer and its module hold each other, and a GPU may be shared with other runs."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
