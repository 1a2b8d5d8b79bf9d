"""All tasks, methods, learning rates, ranks and seeds as one resumable job: ``python -m experiments.vtab sweep``.

Per task and method: tuning on train800/val200 over the grid, choice of learning rate and rank by mean validation
accuracy over the seeds, then final runs on all 1,000 images and the test set, which start as soon as this choice is
made. Every run is a row of one results store. The command can be ended anywhere, also by ``kill -9``, and started again
with another number of workers or another backend: it goes on with what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError
from experiments.runner.cli import in_terminal
from experiments.vtab.backends import Backend, open_backend
from experiments.vtab.jobs import PHASE_FOLDERS
from experiments.vtab.schedule import Schedule
from experiments.vtab.store_writer import StoreWriter, held_store, refuse_if_held
from experiments.vtab.sweep_checks import check_everything, expected_slots, may_keep_models
from experiments.vtab.sweep_progress import SweepProgress, headline
from experiments.vtab.sweep_settings import Settings, parse
from experiments.vtab.worker import Outcome, WorkerOptions

__all__ = ["Settings", "command_line", "main", "parse"]

#: Between signs of life to the store; far below the lease.
_HEARTBEAT_SECONDS = 10.0
_POLL_SECONDS = 1.0
#: So many failures without a single success are one cause, not so many.
_ALIKE = 3


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command line `args` (``sys.argv`` for None); returns the rows of the sweep, or none with ``--plan``.

    Raises:
        MissingInputError: Data or a weight file is missing.
        InputError: A setting is wrong, another sweep holds the store, the disk is full, or every run fails.
        UnreachableError: The hub or the Ray cluster does not answer.
        KeyboardInterrupt: Ctrl-C, or the process was asked to end; everything is in order.
    """
    settings = parse(args)
    if settings.plan:
        from experiments.vtab.plan import plan

        print(plan(settings), flush=True)
        return []
    refuse_if_held(settings.store_path)
    check_everything(settings)
    try:
        with _ending_politely(), held_store(settings.store_path) as store:
            return _sweep(settings, store)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(_no_room(settings)) from error
        raise


def _sweep(settings: Settings, store: StoreWriter) -> list[dict[str, Any]]:
    schedule = Schedule(settings, store)
    if store.taken_over is not None:
        holder, rows = store.taken_over
        print(f"taking over from {holder.text}, which has ended: {rows} of its runs start again", flush=True)
    _clear_unfinished(settings, store)
    counts = schedule.counts()
    total = counts.total()
    print(
        f"{total} runs ({len(settings.task_names)} tasks x {len(settings.keys)} methods) in {settings.store_path}: "
        f"{counts['done']} done, {counts['failed']} failed, {total - counts['done'] - counts['failed']} to do",
        flush=True,
    )
    if counts["pending"]:
        _run(settings, schedule, store)
    _report(settings, schedule)
    return schedule.rows()


def _run(settings: Settings, schedule: Schedule, store: StoreWriter) -> None:
    """Run what is pending, by the backend, until nothing is left to start."""
    backend = _open(settings)
    counts = schedule.counts()
    stopped: BaseException | None = None
    try:
        print(backend.describe(), flush=True)
        with SweepProgress(counts["done"] + counts["failed"], counts.total(), settings.progress) as progress:
            _loop(settings, schedule, store, backend, progress)
    except BaseException as error:
        stopped = error
        raise
    finally:
        backend.close()
        if stopped is not None:
            # what finished in the very last moment has left its metrics in its folder, and is not run again
            with contextlib.suppress(OSError, ValueError):
                schedule.release_all()
            if isinstance(stopped, KeyboardInterrupt):
                _report(settings, schedule, interrupted=True)


def _loop(
    settings: Settings, schedule: Schedule, store: StoreWriter, backend: Backend, progress: SweepProgress
) -> None:
    beat = time.monotonic()
    done, failed = 0, 0
    while True:
        while len(schedule.running) < backend.slots:
            job = schedule.claim()
            if job is None:
                break
            backend.submit(job)
        if not schedule.running:
            return
        for outcome in backend.poll(_POLL_SECONDS):
            job = schedule.running[outcome.run_id]
            if outcome.kind == "no-room":
                raise OSError(errno.ENOSPC, outcome.error)
            chosen = {id(cell) for cell in schedule.cells if cell.choice is not None}
            status = schedule.record(outcome)
            if status == "done":
                done += 1
                if not job.keeps_folder:
                    shutil.rmtree(job.folder().path, ignore_errors=True)
                progress.finished(headline(schedule.row(job)))
            elif status == "failed":
                failed += 1
                progress.finished(f"{job}: failed")
                progress.say(f"failed: {job}: {_last_line(outcome)}")
            else:
                progress.say(f"a worker process was {outcome.error}; its run starts again: {job}")
            for cell in schedule.cells:
                if cell.choice is not None and id(cell) not in chosen:
                    progress.say(f"{cell}: {cell.choice.point}, by {cell.choice.accuracy:.1%} on val200")
            if not done and failed >= max(_ALIKE, 2 * backend.slots):
                raise InputError(
                    f"the first {failed} runs failed, the last one with {_last_line(outcome)!r} (tracebacks are in "
                    f"{store.path}): remove the cause, then add --retry-failed"
                )
        if time.monotonic() - beat > _HEARTBEAT_SECONDS:
            beat = time.monotonic()
            store.heartbeat()


def _open(settings: Settings) -> Backend:
    slots = expected_slots(settings)
    options = WorkerOptions(settings.threads_for(slots), may_keep_models(settings, slots), settings.checkpoint_minutes)
    return open_backend(
        settings.backend,
        options,
        workers=settings.workers,
        gpus_per_run=0.0 if settings.base.accelerator == "cpu" else settings.gpus_per_run,
        cpus_per_run=settings.cpus_per_run,
        address=settings.ray_address,
        log_folder=str(Path(settings.output) / "workers"),
    )


def _clear_unfinished(settings: Settings, store: StoreWriter) -> None:
    """Remove the folders of tuning runs whose rows are done: their figures are in the store."""
    folder = Path(settings.output) / PHASE_FOLDERS["tune"]
    if not folder.is_dir() or settings.base.logger != "none":
        return
    done = {row["run_id"][:8] for row in store.rows(details=False, phase="tune", status="done")}
    for entry in folder.iterdir():
        # what loggers wrote, perhaps in an earlier sweep, is somebody's to keep
        logged = any((entry / name).is_dir() for name in ("csv", "tensorboard", "wandb"))
        if entry.name.rpartition("-")[2] in done and not logged:
            shutil.rmtree(entry, ignore_errors=True)


def _report(settings: Settings, schedule: Schedule, interrupted: bool = False) -> None:
    """What is done and what to do next, on standard output."""
    counts = schedule.counts()
    left = counts["pending"] + counts["running"] + counts["later"]
    lines = []
    if interrupted:
        lines.append(f"interrupted: {counts['done']} of {counts.total()} runs are done; the same command goes on")
    else:
        lines.append(f"{counts['done']} of {counts.total()} runs are done" + (f", {left} wait" if left else ""))
    if counts["failed"]:
        job, error = next(schedule.failures())
        lines.append(
            f"{counts['failed']} failed, such as {job}: {error.strip().splitlines()[-1]} (--retry-failed runs them "
            "again; the store has the tracebacks)"
        )
        held = schedule.held_up()
        if held and not settings.skip_failed:
            lines.append(
                f"failed tuning runs hold up the final runs of {len(held)} tasks and methods, such as {held[0]} "
                "(--skip-failed chooses without them)"
            )
    elif not left and not interrupted:
        precisions = sorted({str(row["metrics"].get("precision")) for row in schedule.rows()})
        if len(precisions) > 1:
            lines.append(
                f"note: runs differ in precision ({', '.join(precisions)}), as their devices do; see --precision"
            )
        lines.append(f"the table: python -m experiments.vtab table --store {settings.store_path}")
    print("\n".join(lines), flush=True)


def _last_line(outcome: Outcome) -> str:
    lines = (outcome.error or "").strip().splitlines()
    return lines[-1] if lines else "no reason"


def _no_room(settings: Settings) -> str:
    free = shutil.disk_usage(settings.output).free / 1e6
    return (
        f"the disk that holds {settings.output} is full ({free:.0f} MB free): what is done is in {settings.store_path} "
        "and stays; make room, then the same command goes on"
    )


@contextlib.contextmanager
def _ending_politely() -> Iterator[None]:
    """A request to end (SIGTERM, as batch systems and containers send it) is like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal. Exit status 1: some runs failed; 2: wrong input; 130: interrupted."""
    failed: list[bool] = []

    def run_main(words: Sequence[str] | None) -> None:
        failed.extend(row["status"] == "failed" for row in main(words))

    try:
        status = in_terminal(run_main, args)
    except KeyboardInterrupt:
        return 130
    return status or int(any(failed))


if __name__ == "__main__":
    sys.exit(command_line())
