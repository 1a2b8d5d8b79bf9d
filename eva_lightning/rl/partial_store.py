"""What a collection of demonstrations has finished so far, so that it can be interrupted at any moment."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from eva_lightning.errors import InputError, check_number
from eva_lightning.files import replacing, temporary_name
from eva_lightning.rl.demonstrations import (
    INDEX,
    DemonstrationMeta,
    TaskDemonstrations,
    TaskEntry,
    decode,
    encode,
    join,
    load_task,
    read_index,
    write_task,
)
from eva_lightning.rl.tasks import MAX_SEED, check_horizon

logger = logging.getLogger(__name__)

#: Episodes between two writes: what an interruption can cost each process, about two seconds.
CHUNK = 10
_PARTIAL = ".partial"
_SPAN = re.compile(r"(0|[1-9]\d{0,8})-([1-9]\d{0,8})\.npz")
_PACKAGES = ("metaworld", "mujoco", "gymnasium", "numpy")


@dataclass(frozen=True)
class Conditions:
    """What decides, with the task and its number, the bits of an episode.

    Attributes:
        noise: Standard deviation of the Gaussian noise added to the expert's clipped action.
        seed: Seed of goals and noise.
        horizon: Steps per episode.

    Raises:
        InputError: `noise` is negative or not finite, or `horizon` is not from 1 to 500.
    """

    noise: float
    seed: int
    horizon: int

    def __post_init__(self) -> None:
        check_number("noise", self.noise, at_least=0)
        check_number("seed", self.seed, at_least=0, below=MAX_SEED, whole=True)
        check_horizon(self.horizon)

    def check_folder(self, folder: Path) -> None:
        """Refuse to add to demonstrations that were made under other conditions.

        Raises:
            InputError: `folder` holds such demonstrations.
        """
        for task, entry in _entries(folder).items():
            if entry.source is not None:
                raise InputError(
                    f"{folder} holds demonstrations of {task} that were imported from {entry.source}: choose another "
                    "folder for those of the scripted experts"
                )
            for name in ("noise", "seed", "horizon"):
                there, now = getattr(entry, name), getattr(self, name)
                if there != now:
                    raise InputError(
                        f"{folder} holds demonstrations of {task} with {name} {there}, not {now}: choose another folder"
                    )


@dataclass(frozen=True)
class Chunk:
    """Episodes `start` to `stop` (excluded) of one task."""

    task: str
    start: int
    stop: int


class PartialStore:
    """Finished chunks of unfinished tasks, in a folder per conditions, and what is known of finished tasks.

    Args:
        folder: Folder of demonstrations that no other process is writing to.
        conditions: Of the demonstrations.
    """

    def __init__(self, folder: Path, conditions: Conditions) -> None:
        self._folder = folder
        self._conditions = conditions
        name = f"noise{conditions.noise!r}-seed{conditions.seed}-horizon{conditions.horizon}"
        self._partial = folder / _PARTIAL / name
        # left by writers that were killed
        for path in (*folder.glob(temporary_name("*")), *self._partial.glob(temporary_name("*"))):
            path.unlink(missing_ok=True)

    def missing(self, task: str, episodes: int) -> list[Chunk]:
        """What is left to do for `task` to have `episodes` episodes."""
        entry = _entries(self._folder).get(task)
        have: set[int] = set()
        if entry is not None:
            if self._finished(task) is not None:
                have.update(range(entry.episodes))
            else:
                episodes = max(episodes, entry.episodes)
        for chunk in self._chunks(task):
            have.update(range(chunk.start, chunk.stop))
        return [
            Chunk(task, start, stop)
            for begin in range(0, episodes, CHUNK)
            for start, stop in _runs([i for i in range(begin, min(begin + CHUNK, episodes)) if i not in have])
        ]

    def add(self, chunk: Chunk, demonstrations: TaskDemonstrations) -> None:
        """Keep a finished chunk."""
        with replacing(self._path(chunk)) as temporary:
            temporary.write_bytes(encode(demonstrations, compress=False))

    def finish(self, task: str) -> None:
        """Make one file of all that there is of `task`, if that is more than its file holds already."""
        chunks = self._chunks(task)
        if not chunks:
            return
        old = self._finished(task)
        parts = [] if old is None else [old]
        have = sum(len(part) for part in parts)
        for chunk in chunks:
            # a chunk can reach into what the file has, where a kill came between writing that and deleting this
            if chunk.start <= have < chunk.stop:
                demonstrations = self._read(chunk)
                parts.append(demonstrations.episodes(have - chunk.start))
                have = chunk.stop
        if old is None or have > len(old):
            meta = DemonstrationMeta(self._conditions.noise, self._conditions.seed, self._versions(task, old))
            write_task(self._folder, join(parts), meta)
        for chunk in chunks:
            if chunk.stop <= have:
                self._path(chunk).unlink()

    def close(self) -> None:
        """Remove the folders if they are empty."""
        for path in (self._partial, self._partial.parent):
            with contextlib.suppress(OSError):
                path.rmdir()

    def _versions(self, task: str, old: TaskDemonstrations | None) -> Mapping[str, str]:
        """Of the packages that made the first episode."""
        versions = {name: version(name) for name in _PACKAGES}
        before = versions if old is None else dict(read_index(self._folder)[task].versions)
        if before != versions:
            logger.warning("%s: new episodes come from %s, earlier ones from %s", task, versions, before)
        return before

    def _finished(self, task: str) -> TaskDemonstrations | None:
        if task not in _entries(self._folder):
            return None
        try:
            return load_task(self._folder, task)
        except InputError as error:
            logger.warning("%s is collected again: %s", task, error)
            return None

    def _chunks(self, task: str) -> list[Chunk]:
        chunks = []
        for path in self._partial.glob(f"{task}.*.npz"):
            span = _SPAN.fullmatch(path.name.removeprefix(f"{task}."))
            if span is None:  # not one of ours
                continue
            chunk = Chunk(task, int(span[1]), int(span[2]))
            try:
                found = self._read(chunk)
            except InputError as error:
                logger.warning("%s is collected again: %s", path.name, error)
                path.unlink()
                continue
            if (len(found), found.horizon) == (chunk.stop - chunk.start, self._conditions.horizon):
                chunks.append(chunk)
        return sorted(chunks, key=lambda chunk: chunk.start)

    def _read(self, chunk: Chunk) -> TaskDemonstrations:
        path = self._path(chunk)
        return decode(chunk.task, path.read_bytes(), path)

    def _path(self, chunk: Chunk) -> Path:
        return self._partial / f"{chunk.task}.{chunk.start}-{chunk.stop}.npz"


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Borders ``(start, stop)`` of the runs of consecutive numbers in an ascending list."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i


def _entries(folder: Path) -> Mapping[str, TaskEntry]:
    return read_index(folder).tasks if (folder / INDEX).is_file() else {}
