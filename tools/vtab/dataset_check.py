"""What of VTAB-1K is in a folder, and what is wrong with it: one :class:`TaskStatus` per task.

Counts and labels are compared with the official ones and every listed image is decoded. Decoding takes minutes for all
19 tasks, so its findings are kept in ``<root>/.vtab1k-check.json``, under a fingerprint of names, sizes and times: the
next check decodes only what has changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from eva_lightning.errors import InputError
from eva_lightning.files import write_text
from eva_lightning.sealed import read_sealed_json, write_sealed_json
from eva_lightning.threads import ordered_map
from eva_lightning.vision.data.images import image_damage
from eva_lightning.vision.data.split_files import Split, read_split
from eva_lightning.vision.data.splits import files_digest
from eva_lightning.vision.data.tasks import SPLITS, TASKS, VTABTask, expected_size, get_task

logger = logging.getLogger(__name__)

Verdict = Literal["ok", "usable", "incomplete", "missing"]

_MEMORY = ".vtab1k-check.json"
_FORMAT = 2
_NO_FOLDER = "the folder is missing"
_PARTS = ("train800", "val200")


@dataclass(frozen=True)
class TaskStatus:
    """One task of a VTAB-1K folder.

    Attributes:
        task: What it should be.
        counts: Split name -> images its file lists; None where the file is missing or cannot be read.
        classes: Labels that occur in any split file.
        images: Different images that the split files list.
        missing: Listed images that are not there.
        broken: Listed images that cannot be decoded, by path relative to the task folder.
        truncated: JPEGs that end early: they are used, with the rest in grey.
        problems: What keeps the task from being used, one clause each. Unpacking the archive mends all of them.
        notes: What can be worked with but should be known, one clause each.
        unreadable: Split files with a bad line or label, by name.
    """

    task: VTABTask
    counts: dict[str, int | None]
    classes: int
    images: int
    missing: int
    broken: tuple[str, ...]
    truncated: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def damaged(self) -> tuple[str, ...]:
        """Files that have to be replaced, by path relative to the task folder."""
        return (*self.broken, *self.unreadable)

    @property
    def verdict(self) -> Verdict:
        """``ok``: the official sizes, and all images decode; ``usable``: runs, but is not comparable with published
        numbers or has truncated images; ``incomplete``: something is missing or broken; ``missing``: no such folder."""
        if self.problems:
            return "missing" if self.problems == (_NO_FOLDER,) else "incomplete"
        return "usable" if self.notes else "ok"

    @property
    def usable(self) -> bool:
        """Whether both protocols of the paper can be run."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the official sizes beside the counts."""
        return {
            "task": self.task.name,
            "group": self.task.group,
            "verdict": self.verdict,
            "usable": self.usable,
            "counts": self.counts,
            "official_counts": {split: expected_size(self.task, split) for split in SPLITS},
            "classes": self.classes,
            "official_classes": self.task.classes,
            "images": self.images,
            "missing_images": self.missing,
            "broken_images": list(self.broken),
            "truncated_images": list(self.truncated),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def check_tasks(
    root: str | Path,
    tasks: Sequence[str] = tuple(TASKS),
    workers: int | None = None,
    advance: Callable[[str, int, int], None] | None = None,
) -> list[TaskStatus]:
    """Check `tasks` in `root`, decoding every image whose file was not decoded before.

    Args:
        root: Folder that holds the task folders. It need not exist.
        tasks: Task names.
        workers: Decoding threads, all cores for None.
        advance: Called with a task, the number of its images decoded so far and their total.

    Returns:
        One status per task, in the order given.

    Raises:
        InputError: Unknown task.
    """
    folder = Path(root)
    specs = [get_task(task) for task in tasks]
    memory = _Memory(folder)
    threads = os.cpu_count() or 1 if workers is None else workers
    return [_check(folder / spec.name, spec, memory, threads, advance) for spec in specs]


def _check(
    folder: Path,
    spec: VTABTask,
    memory: _Memory,
    workers: int,
    advance: Callable[[str, int, int], None] | None,
) -> TaskStatus:
    if not folder.is_dir():
        empty = dict.fromkeys(SPLITS)
        return TaskStatus(spec, empty, 0, 0, 0, (), (), (_NO_FOLDER,), ())
    splits, problems, unreadable = _read_splits(folder, spec)
    counts = {name: len(splits[name]) if name in splits else None for name in SPLITS}
    paths = sorted({path for split in splits.values() for path in split.paths})
    present = [path for path in paths if (folder / path).is_file()]
    missing = len(paths) - len(present)
    if missing:
        first = min(set(paths).difference(present))
        problems.append(f"{missing} of {len(paths)} listed images are missing, such as {first}")
    broken, truncated = memory.damage(folder, present, workers, advance)
    if broken:
        problems.append(f"{len(broken)} images cannot be decoded, such as {broken[0]}")
    occurring = {label for split in splits.values() for label in split.labels}
    if len(splits) == len(SPLITS) and len(occurring) < spec.classes:
        problems.append(f"only {len(occurring)} of the {spec.classes} classes occur in the split files")
    return TaskStatus(
        spec,
        counts,
        len(occurring),
        len(paths),
        missing,
        broken,
        truncated,
        tuple(problems),
        tuple(_notes(spec, splits, truncated)),
        tuple(unreadable),
    )


def _read_splits(folder: Path, spec: VTABTask) -> tuple[dict[str, Split], list[str], list[str]]:
    """The split files that can be read, what is wrong with the others, and the names of those that are there."""
    splits: dict[str, Split] = {}
    problems: list[str] = []
    unreadable: list[str] = []
    for name in SPLITS:
        if not (folder / f"{name}.txt").is_file():
            problems.append(f"{name}.txt is missing")
            continue
        try:
            splits[name] = read_split(folder, name, spec.classes)
        except InputError as error:
            # the table names the folder, and the summary below it the remedy
            problems.append(str(error).replace(f"{folder}{os.sep}", "").partition(": take it again")[0])
            unreadable.append(f"{name}.txt")
    return splits, problems, unreadable


def _notes(spec: VTABTask, splits: dict[str, Split], truncated: tuple[str, ...]) -> list[str]:
    notes = [
        f"{name}.txt lists {len(split)} images where VTAB-1K has {expected_size(spec, name)}: results are not "
        "comparable with published numbers (for the archive's file, delete it and prepare again)"
        for name, split in splits.items()
        if len(split) != expected_size(spec, name)
    ]
    if all(name in splits for name in (*_PARTS, "train800val200")):
        # the archive keeps a second copy of the images for the joint split, so paths differ
        joined = [label for name in _PARTS for label in splits[name].labels]
        if sorted(joined) != sorted(splits["train800val200"].labels):
            notes.append("train800val200.txt has other labels than train800.txt and val200.txt together")
    if truncated:
        notes.append(f"{len(truncated)} JPEGs end early, such as {truncated[0]}: the missing part is filled with grey")
    return notes


def join_training_splits(root: str | Path, task: str) -> bool:
    """Write ``train800val200.txt`` of `task` where it alone is missing, from ``train800.txt`` and ``val200.txt``.

    Returns:
        Whether it was written.
    """
    folder = Path(root) / get_task(task).name
    joint = folder / "train800val200.txt"
    parts = [folder / f"{name}.txt" for name in _PARTS]
    if joint.exists() or not all(part.is_file() for part in parts):
        return False
    lines = [line for part in parts for line in part.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    write_text(joint, "\n".join(lines) + "\n")
    return True


class _Memory:
    """Which images of which tasks were found damaged, on disk as far as the folder can be written."""

    def __init__(self, root: Path) -> None:
        self.file = root / _MEMORY
        self.tasks: dict[str, dict[str, Any]] = {}
        try:
            content = read_sealed_json(self.file)
        except (InputError, OSError):
            return  # never checked, or damaged: check again
        if content.get("format") == _FORMAT and isinstance(content.get("tasks"), dict):
            self.tasks = content["tasks"]

    def damage(
        self,
        folder: Path,
        paths: list[str],
        workers: int,
        advance: Callable[[str, int, int], None] | None,
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The broken and the truncated ones among `paths`."""
        state = files_digest(folder, paths)
        known = self.tasks.get(folder.name)
        if not _is_finding(known) or known["fingerprint"] != state:
            found: dict[str, list[str]] = {"broken": [], "truncated": []}
            damages = ordered_map(lambda path: _damage(folder / path), paths, workers)
            for index, (path, damage) in enumerate(zip(paths, damages, strict=True), start=1):
                if damage is not None:
                    found[damage].append(path)
                if advance is not None:
                    advance(folder.name, index, len(paths))
            known = {"fingerprint": state, **found}
            if paths:
                self.tasks[folder.name] = known
                self._write()
        return tuple(known["broken"]), tuple(known["truncated"])

    def _write(self) -> None:
        try:
            write_sealed_json(self.file, {"format": _FORMAT, "tasks": self.tasks})
        except OSError as error:
            logger.debug("the findings of the check are not kept: %s", error)


def _is_finding(known: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(known, dict) and all(
        isinstance(known.get(name), kind)
        for name, kind in (("fingerprint", str), ("broken", list), ("truncated", list))
    )


def _damage(path: Path) -> Literal["broken", "truncated"] | None:
    try:
        return image_damage(path)
    except InputError:
        return "broken"
