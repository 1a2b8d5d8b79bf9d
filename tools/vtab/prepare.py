"""Get VTAB-1K and check it: ``python -m experiments.vtab prepare --root DIR``.

Tasks that are in the folder are checked; missing ones come from an archive (``--archive``), from the original data
(``--from-originals``), or else from the Hugging Face hub. A table says what is there: counts and classes beside the
official ones, and whether every image can be decoded. Safe to interrupt; rerun to continue.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)  # fmt: skip
from rich.table import Table

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import only_process, write_json
from eva_lightning.vision.data.tasks import SPLITS, TASKS, expected_size, get_task
from experiments.runner.calling import as_called
from experiments.runner.cli import in_terminal
from experiments.runner.ending import leave, was_interrupted
from experiments.runner.settings import Role, check_settings, flag, option, parse_settings
from tools.vtab.archive import download, find_archives, find_members, remove_download, unpack
from tools.vtab.dataset_check import TaskStatus, check_tasks, join_training_splits
from tools.vtab.originals import ORIGINALS
from tools.vtab.originals.build import build_task, require_original

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """Everything one preparation is asked to do."""

    root: str = option(MISSING, "folder for the task folders", Role.PLACE)
    task: tuple[str, ...] | None = option(None, "task names; all 19 if not given", Role.SELECTION)
    archive: tuple[str, ...] | None = option(None, "vtab-1k.zip, zips of tasks, or a folder of zips", Role.PLACE)
    from_originals: str | None = option(None, "folder of the original data sets, to build tasks from", Role.PLACE)
    check: bool = option(False, "only check what is there", Role.SELECTION)
    keep_archive: bool = option(False, "keep the downloaded archive after it was unpacked", Role.PLACE)
    workers: int | None = option(None, "threads that unpack and decode; all cores if not given", Role.PLACE, at_least=1)
    json: str | None = option(None, "file for the table as JSON", Role.PLACE)
    progress: bool = option(True, "show progress bars", Role.PLACE)

    def __post_init__(self) -> None:
        check_settings(self)
        given = [name for name in ("archive", "from_originals", "check") if getattr(self, name)]
        if len(given) > 1:
            raise InputError(f"choose one of {' and '.join(map(flag, given))}")

    @property
    def tasks(self) -> list[str]:
        """The tasks asked for, in the order of the benchmark.

        Raises:
            InputError: Unknown task.
        """
        if self.task is None:
            return list(TASKS)
        named = {get_task(name).name for name in self.task}
        if not named:
            raise InputError("task must name at least one task", setting="task")
        return [name for name in TASKS if name in named]

    @property
    def threads(self) -> int:
        """Number of threads."""
        return self.workers or os.cpu_count() or 1


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    return parse_settings(
        Settings, "python -m experiments.vtab prepare", (__doc__ or "").splitlines()[0].rstrip("."), args
    )


def main(args: Sequence[str] | None = None) -> list[TaskStatus]:
    """Run the command line `args` (``sys.argv`` for None) and return the status of every task asked for.

    Raises:
        MissingInputError: Root (where it is only to be checked), archive or original data missing.
        InputError: A setting is wrong, the archive is damaged, or there is too little room.
        UnreachableError: Tasks are missing and the hub does not answer.
        OSError: Writing failed.
    """
    settings = parse(args)
    tasks = settings.tasks
    root = Path(settings.root).expanduser()
    _require_root(root, settings)
    if settings.check:
        statuses = _check(settings, root, tasks)
    else:
        root.mkdir(parents=True, exist_ok=True)
        with only_process(root / ".prepare.lock", f"another prepare is at work in {root}"):
            statuses = _prepare(settings, root, tasks)
    _report(settings, root, statuses)
    if settings.json is not None:
        write_json(settings.json, [status.as_json() for status in statuses])
    return statuses


def _require_root(root: Path, settings: Settings) -> None:
    if root.exists() and not root.is_dir():
        raise InputError(f"root must be a folder, and {root} is a file (pass a zip as --archive)")
    if settings.check and not root.is_dir():
        raise MissingInputError(f"folder {root} does not exist: there is nothing to check")
    if not root.is_dir():
        return
    if any((root / f"{split}.txt").is_file() for split in SPLITS):
        raise InputError(f"{root} is itself a task folder: pass its parent folder ({root.resolve().parent}) as --root")
    inner = [entry for entry in sorted(root.iterdir()) if entry.is_dir() and any((entry / t).is_dir() for t in TASKS)]
    if inner and not any((root / task).is_dir() for task in TASKS):
        raise InputError(f"{root} holds no task folder, but {inner[0]} does: pass that as --root")


def _prepare(settings: Settings, root: Path, tasks: list[str]) -> list[TaskStatus]:
    for task in tasks:
        join_training_splits(root, task)
    if settings.from_originals is not None:
        _build(settings, root, tasks, Path(settings.from_originals).expanduser())
        return _check(settings, root, tasks)
    # before anything that takes minutes: what is missing must be obtainable
    archives = find_archives(settings.archive) if settings.archive is not None else []
    absent = [task for task in tasks if not (root / task).is_dir()]
    if absent and not archives:
        archives = [download(root, _missing(root, tasks, absent), settings.progress)]
    statuses = _check(settings, root, tasks)
    wanted = [status.task.name for status in statuses if status.verdict != "ok"]
    if not archives and any(not status.usable for status in statuses):
        archives = [download(root, _missing(root, tasks, wanted), settings.progress)]
    if archives and wanted:
        _unpack(settings, root, archives, wanted, statuses)
        for task in tasks:
            join_training_splits(root, task)
        statuses = _check(settings, root, tasks)
    if not settings.keep_archive and all(status.usable for status in statuses):
        remove_download(root)
    return statuses


def _missing(root: Path, tasks: list[str], wanted: list[str]) -> str:
    there = [task for task in tasks if task not in wanted]
    names = ", ".join(wanted[:3]) + (", …" if len(wanted) > 3 else "")
    advice = f"; --task {','.join(there)} asks for what is there" if there else ""
    return f"{len(wanted)} of {len(tasks)} tasks are not whole in {root} ({names}{advice})"


def _unpack(
    settings: Settings, root: Path, archives: list[Path], wanted: list[str], statuses: list[TaskStatus]
) -> None:
    members = find_members(archives)
    if not any(task in members for task in wanted):
        found = ", ".join(members) or "none"
        raise InputError(
            f"{', '.join(map(str, archives))} holds none of the tasks that are missing in {root} "
            f"({', '.join(wanted)}); tasks in it: {found}"
        )
    damaged = {status.task.name: status.damaged for status in statuses}
    with _bar("unpacking", settings, "bytes") as advance:
        unpack(
            {task: members[task] for task in wanted if task in members},
            root,
            replace=damaged,
            workers=settings.threads,
            advance=advance,
        )


def _build(settings: Settings, root: Path, tasks: list[str], originals: Path) -> None:
    """Build the tasks that are not there: those named, or else those whose data is found."""
    if not originals.is_dir():
        raise MissingInputError(f"folder {originals} of original data does not exist")
    absent = [task for task in tasks if not (root / task).is_dir()]
    if settings.task is not None:
        chosen = [require_original(task) for task in absent]
    else:
        chosen = [ORIGINALS[task] for task in absent if task in ORIGINALS and ORIGINALS[task].found_in(originals)]
        if absent and not chosen:
            needs = sorted({ORIGINALS[task].needs[0] for task in absent if task in ORIGINALS})
            raise MissingInputError(
                f"{originals} holds no original data of a missing task; looked for {', '.join(needs)}"
            )
    for original in chosen:
        with _bar("building", settings, "images") as advance:
            build_task(original, originals, root, workers=settings.threads, advance=advance)


def _check(settings: Settings, root: Path, tasks: list[str]) -> list[TaskStatus]:
    with _bar("decoding", settings, "images") as advance:
        return check_tasks(root, tasks, settings.threads, advance)


@contextmanager
def _bar(what: str, settings: Settings, unit: str) -> Iterator[Advance | None]:
    """A progress bar on standard error, one row per task, or nothing where it is unwanted or no terminal."""
    console = Console(stderr=True)
    if not (settings.progress and console.is_terminal):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        rows: dict[str, TaskID] = {}

        def advance(task: str, done: int, total: int) -> None:
            if task not in rows:
                for row in rows.values():
                    progress.remove_task(row)
                rows.clear()
                rows[task] = progress.add_task(f"{what} {task}", total=total)
            progress.update(rows[task], completed=done)

        yield advance


def _report(settings: Settings, root: Path, statuses: Sequence[TaskStatus]) -> None:
    table = Table(title=f"VTAB-1K in {root}")
    for name in ("task", "group"):
        table.add_column(name, no_wrap=True)
    for name in (*SPLITS, "classes", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("remarks", ratio=1)
    group = None
    for status in statuses:
        if group not in (None, status.task.group):
            table.add_section()
        group = status.task.group
        table.add_row(*_row(status))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for line in _summary(settings, root, statuses):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _row(status: TaskStatus) -> list[str]:
    colour = {"ok": "green", "usable": "yellow", "incomplete": "red", "missing": "dim"}[status.verdict]
    cells = [status.task.name, status.task.group]
    for split in SPLITS:
        count, official = status.counts[split], expected_size(status.task, split)
        cells.append("-" if count is None else f"{count}" if count == official else f"{count} of {official}")
    cells.append(
        f"{status.classes}" if status.classes == status.task.classes else f"{status.classes} of {status.task.classes}"
    )
    bad = status.missing + len(status.broken)
    cells.append(
        "-" if not status.images else f"{status.images}" if not bad else f"{status.images - bad} of {status.images}"
    )
    cells.append(f"[{colour}]{status.verdict}[/]")
    cells.append(escape("; ".join((*status.problems, *status.notes))))
    return cells


def _summary(settings: Settings, root: Path, statuses: Sequence[TaskStatus]) -> Iterator[str]:
    bad = [status.task.name for status in statuses if not status.usable]
    good = [status.task.name for status in statuses if status.usable]
    there = f": {', '.join(good)}" if good and bad else ""
    yield f"{len(good)} of {len(statuses)} tasks can be used{there}"
    if not bad:
        return
    names = "" if settings.task is None else f" --task {','.join(bad)}"
    yield as_called(
        "what is missing or damaged comes from the Hugging Face hub, or from --archive FILE, by: "
        f"python -m experiments.vtab prepare --root {root}{names}"
    )


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal. Exit status 1: a task that was asked for cannot be used, or the disk fails; 2: the
    input is wrong, or the hub does not answer (one sentence on standard error); 130: interrupted."""
    statuses: list[TaskStatus] = []
    try:
        status = in_terminal(lambda words: statuses.extend(main(words)), args)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        print(f"error: {reason}; what was finished is kept, rerun to continue", file=sys.stderr)
        return 1
    if was_interrupted(status):
        print("interrupted: what was finished is kept, rerun to continue", file=sys.stderr)
    return status or (0 if all(found.usable for found in statuses) else 1)


if __name__ == "__main__":
    leave(command_line())
