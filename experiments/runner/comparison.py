"""Run a comparison: tune every cell, choose, do the final runs, report. Safe to interrupt; rerun to resume."""

from __future__ import annotations

import errno
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eva_lightning import ours
from eva_lightning.errors import InputError
from eva_lightning.files import check_writable, format_bytes, free_bytes, is_disk_full
from eva_lightning.names import check_length
from experiments.runner.cells import Cell
from experiments.runner.ending import asked_to_end
from experiments.runner.holder import Hold, held, refuse_if_held
from experiments.runner.jobs import Job, Outcome
from experiments.runner.options import RunnerOptions
from experiments.runner.pool import Pool, check_pool, open_pool
from experiments.runner.progress import Progress, span
from experiments.runner.results import Results, write_choices
from experiments.runner.run_folder import clear_runs
from experiments.runner.run_log import logging_to
from experiments.runner.schedule import Schedule
from experiments.runner.worker import WorkerOptions

__all__ = ["Comparison", "Results", "RunnerOptions", "run_comparison"]

_LOGGER = logging.getLogger("experiments.runner.comparison")

_POLL_SECONDS = 1.0
#: What every comparison writes in the folder of the output.
_FILES = ("choices.json", "holder.json", "journal.log", "log.txt")
#: Bytes of the longest path below it.
_ROOM = 256
#: So many failures without a single success have one cause.
_ALIKE = 3
_MOST_ALIKE = 16


class Comparison(ABC):
    """What is compared; derive from it.

    Attributes:
        options: How it is run.
        name: What it is called on the terminal.
        modules: What processes import before their first run.
        files: Names of what :meth:`report` writes in the folder of the output.
    """

    options: RunnerOptions
    name: str = "comparison"
    modules: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def check(self) -> None:  # noqa: B027 - there may be nothing to refuse
        """Refuse what cannot work, before anything starts."""

    def prepare(self) -> None:  # noqa: B027 - nor to make
        """Make what all runs need, such as pre-trained weights and decoded images."""

    @abstractmethod
    def cells(self) -> list[Cell]:
        """What is tuned alone, in the order of the report."""

    @abstractmethod
    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Of a tuning run; lower is better, compared number by number."""

    def in_words(self, score: tuple[float, ...]) -> str:
        """What a choice was made by, for the terminal."""
        return ", ".join(f"{number:.4g}" for number in score)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """A finished run's figures in a few words."""
        return ""

    def look(self, results: Callable[[], Results]) -> None:  # noqa: B027 - the report may do
        """After every run that is finished now: a chance to show a first result. `results` gives what there is."""

    def seconds(self) -> Callable[[Job], float] | None:
        """How long a run takes by the speed measured now, for ``--plan``; None where nothing measures it."""
        return None

    def plan_notes(self) -> list[str]:
        """More lines for ``--plan``, after :meth:`seconds`."""
        return []

    def worker_options(self) -> WorkerOptions:
        """How processes work."""
        return WorkerOptions(self.options.threads_per_run(), self.modules)

    @abstractmethod
    def report(self, results: Results) -> None:
        """Write tables and figures of what is finished, and say where they are."""


def run_comparison(comparison: Comparison, pool: Callable[[], Pool] | None = None) -> Results:
    """Do what the options of `comparison` ask for: plan, report, or run and report.

    Args:
        comparison: What is compared.
        pool: Opens the pool to run in; by the options for None.

    Returns:
        The results; of ``--plan`` what is finished so far.

    Raises:
        InputError: Something cannot work, another process is at it, the disk is full, or every run fails.
        KeyboardInterrupt: Ctrl-C, or the process was asked to end; everything is in order.
    """
    options, output = comparison.options, Path(comparison.options.output)
    if options.plan:
        comparison.check()
        schedule = _schedule(comparison)
        print(_plan(comparison, schedule), flush=True)
        return Results.of(schedule)
    if options.report:
        results = Results.of(_schedule(comparison))
        _claim(comparison)
        _report(comparison, results)
        return results
    check_writable(output)
    refuse_if_held(output)
    check_pool(options)
    comparison.check()
    _claim(comparison)
    try:
        with asked_to_end(), held(output) as hold, logging_to(output / "log.txt"):
            return _run(comparison, hold, pool or (lambda: open_pool(options, comparison.worker_options())))
    except OSError as error:
        if is_disk_full(error):
            raise InputError(
                f"the disk that holds {output} is full ({format_bytes(free_bytes(output))} free): what is done stays; "
                "make room, then rerun to resume"
            ) from error
        raise


def _claim(comparison: Comparison) -> None:
    """Refuse an output folder with files of somebody else's where ours would be."""
    output, names = Path(comparison.options.output), (*_FILES, *comparison.files)
    check_length("output", output, room=_ROOM, setting="output")
    # a comparison of before there were lists has left its lock
    known = names if (output / ".holder.lock").exists() else ()
    ours.claim(output, names, "choose another --output", known=known)


def clear_output(comparison: Comparison) -> None:
    """Delete the comparison's runs and files; what else is in its output stays.

    Raises:
        InputError: Another process is at work there, or files of somebody else's are where ours would be.
    """
    output = Path(comparison.options.output)
    if output.is_dir():
        refuse_if_held(output)
        _claim(comparison)
        clear_runs(output)
        ours.delete(output, (*_FILES, *comparison.files))


def _schedule(comparison: Comparison) -> Schedule:
    options = comparison.options
    return Schedule(
        comparison.cells(), comparison.score, retry_failed=options.retry_failed, skip_failed=options.skip_failed
    )


def _plan(comparison: Comparison, schedule: Schedule) -> str:
    """What there is to do, and how long it takes by the speed measured now."""
    seconds, later = comparison.seconds(), schedule.later()
    known = list(schedule.rows.values())
    lines = []
    for phase, title in (("tune", "tuning"), ("final", "final")):
        jobs = [row for row in known if row.job.phase == phase]
        finished = sum(row.status == "done" for row in jobs)
        number = len(jobs) + sum(job.phase == phase for job in later)
        lines.append(f"{title}: {number} runs, {finished} of them finished")
    lines += comparison.plan_notes()
    if seconds is None:
        return "\n".join(lines)
    total = sum(map(seconds, [*(row.job for row in known if row.status == "pending"), *later]))
    slots = comparison.options.slots_here()
    at_a_time = f"{slots} run{'' if slots == 1 else 's'} at a time"
    estimate = f"estimate: {span(total / slots)} with {at_a_time}, if nothing else needs the machine"
    return "\n".join([*lines, estimate])


def _run(comparison: Comparison, hold: Hold, open_: Callable[[], Pool]) -> Results:
    if hold.taken_over is not None:
        _LOGGER.info("taking over from %s, which has ended", hold.taken_over.text)
    comparison.prepare()
    schedule = _schedule(comparison)
    counts = schedule.counts()
    to_do = counts.total() - counts["done"] - counts["failed"]
    _LOGGER.info(
        "%s: %d runs in %s: %d done, %d failed, %d to do",
        comparison.name, counts.total(), comparison.options.output, counts["done"], counts["failed"], to_do,
    )  # fmt: skip
    write_choices(_choices_file(comparison), schedule.choices())
    if counts["pending"]:
        _run_pending(comparison, schedule, hold, open_)
    results = Results.of(schedule)
    _say_what_is_done(results, schedule)
    _report(comparison, results)
    return results


def _choices_file(comparison: Comparison) -> Path:
    return Path(comparison.options.output) / "choices.json"


def _run_pending(comparison: Comparison, schedule: Schedule, hold: Hold, open_: Callable[[], Pool]) -> None:
    pool = open_()
    counts = schedule.counts()
    try:
        _LOGGER.info("%s", pool.describe())
        over, total = counts["done"] + counts["failed"], counts.total()
        progress_bar = Progress(comparison.name, over, total, comparison.options.progress)
        # again, for some pools take the signals (Ray)
        with asked_to_end(), progress_bar as progress:
            _Loop(comparison, schedule, hold, pool, progress).run()
    except KeyboardInterrupt:
        counts = schedule.counts()
        _LOGGER.info("interrupted: %d of %d runs are done; rerun to resume", counts["done"], counts.total())
        raise
    finally:
        pool.close()


class _Loop:
    """Keeps a pool busy until nothing is left to start."""

    def __init__(self, comparison: Comparison, schedule: Schedule, hold: Hold, pool: Pool, progress: Progress) -> None:
        self._comparison = comparison
        self._schedule = schedule
        self._hold = hold
        self._pool = pool
        self._progress = progress
        self._done = self._failed = 0
        self._chosen = set(schedule.choices())

    def run(self) -> None:
        while True:
            self._submit()
            if not self._schedule.running:
                return
            for outcome in self._pool.poll(_POLL_SECONDS):
                self._record(outcome)
            self._hold.check()

    def _submit(self) -> None:
        while len(self._schedule.running) < self._pool.slots:
            job = self._schedule.claim()
            if job is None:
                return
            self._pool.submit(job)

    def _record(self, outcome: Outcome) -> None:
        if outcome.kind == "no-room":
            raise OSError(errno.ENOSPC, outcome.error)
        job = self._schedule.running[outcome.id]
        status = self._schedule.record(outcome)
        total = self._schedule.counts().total()
        if status == "done":
            self._done += 1
            text = self._comparison.headline(outcome.metrics or {})
            self._progress.finished(f"{job}: {text}" if text else str(job), total)
            self._comparison.look(lambda: Results.of(self._schedule))
        elif status == "failed":
            self._failed += 1
            self._progress.finished(f"{job}: failed", total)
            _LOGGER.warning("failed: %s: %s", job, outcome.reason)
        else:
            _LOGGER.warning("a worker process was %s; its run starts again: %s", outcome.error, job)
        self._note_choices()
        self._stop_if_all_fail(outcome)

    def _note_choices(self) -> None:
        choices = self._schedule.choices()
        new = {name: choice for name, choice in choices.items() if name not in self._chosen}
        for name, choice in new.items():
            _LOGGER.info("%s: %s, by %s in tuning", name, choice.point, self._comparison.in_words(choice.score))
        if new:
            write_choices(_choices_file(self._comparison), new)
        self._chosen |= set(new)

    def _stop_if_all_fail(self, outcome: Outcome) -> None:
        if not self._done and self._failed >= max(_ALIKE, min(2 * self._pool.slots, _MOST_ALIKE)):
            raise InputError(
                f"the first {self._failed} runs failed, the last one with {outcome.reason!r} (tracebacks are in "
                f"error.txt of the runs' folders in {self._comparison.options.output}): remove the cause, then add "
                "--retry-failed"
            )


def _report(comparison: Comparison, results: Results) -> None:
    # a comparison that only tunes has no final runs
    if results.runs.empty and not (results.choices and results.is_complete):
        print("nothing to report yet: no final run is finished", flush=True)
    else:
        comparison.report(results)


def _say_what_is_done(results: Results, schedule: Schedule) -> None:
    """What is done and what to do next."""
    counts = schedule.counts()
    waiting = f", {results.left} wait" if results.left else ""
    _LOGGER.info("%d of %d runs are done%s", counts["done"], counts.total(), waiting)
    if results.failures:
        text, error = results.failures[0]
        _LOGGER.warning(
            "%d failed, such as %s: %s (--retry-failed runs them again; error.txt in their folders has the tracebacks)",
            len(results.failures), text, error.strip().splitlines()[-1],
        )  # fmt: skip
    if results.held_up:
        _LOGGER.warning(
            "failed tuning runs hold up the final runs of %d cells, such as %s (--skip-failed chooses without them)",
            len(results.held_up), results.held_up[0],
        )  # fmt: skip
    if len(results.diverged):
        first = results.diverged.iloc[0]
        _LOGGER.warning(
            "%d final runs diverged, such as %s: %s", len(results.diverged), first["path"], first["diverged"]
        )
    for name in results.without_choice:
        _LOGGER.warning("%s failed or diverged in tuning at every point", name)
