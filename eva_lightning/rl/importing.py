"""Fill a folder of demonstrations with published trajectories, task by task; safe to interrupt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import only_process, temporary_name, writable_folder
from eva_lightning.rl.demonstrations import (
    INDEX,
    DemonstrationIndex,
    DemonstrationMeta,
    TaskEntry,
    load_task,
    read_index,
    write_task,
)
from eva_lightning.rl.published import SUFFIXES, files_of, published_name, read_published
from eva_lightning.rl.published_source import Source
from eva_lightning.rl.tasks import HORIZON

Told = Callable[[str], None]


def import_published(
    source: Source,
    tasks: Sequence[str],
    folder: str | Path,
    *,
    episodes: int | None = None,
    horizon: int = HORIZON,
    tell: Told = lambda text: None,
) -> DemonstrationIndex:
    """Import `tasks`. A task that the folder has from the same files is kept; each is written in one go.

    Args:
        source: Where the files are.
        tasks: Full names of tasks.
        folder: Folder of demonstrations, created if needed.
        episodes: Only the first so many of each task; None for all.
        horizon: Steps that every episode must have.
        tell: Takes a sentence about each task.

    Returns:
        The folder's index.

    Raises:
        MissingInputError: The source has no file of a task.
        UnreachableError: The source is the hub, and it stops answering.
        InputError: A file is damaged or not as expected, the folder holds demonstrations of scripted experts, or some
            other process writes to it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"demonstrations need a folder, and {folder} is a file")
    _refuse_collected(folder)
    names = source.names()
    found = {task: files_of(task, names) for task in tasks}
    for task, files in found.items():
        if not files:
            stem = published_name(task)
            kinds = ", ".join(f"{stem}{ending}" for ending in SUFFIXES)
            raise MissingInputError(f"there are no trajectories of {task}: {kinds} or a folder {stem} is expected")
    with only_process(writable_folder(folder) / ".lock", f"another process is writing to {folder}"):
        for left in folder.glob(temporary_name("*")):
            left.unlink(missing_ok=True)
        for task, files in found.items():
            _import(source, task, files, folder, episodes, horizon, tell)
    return read_index(folder)


def _import(
    source: Source, task: str, names: Sequence[str], folder: Path, episodes: int | None, horizon: int, tell: Told
) -> None:
    origin = source.describe(names) + ("" if episodes is None else f", first {episodes} episodes")
    if _has(folder, task, origin, horizon):
        tell(f"{task}: there already, from {origin}")
        return
    demonstrations, left_out = read_published(task, source.get(names), horizon=horizon, episodes=episodes)
    write_task(folder, demonstrations, DemonstrationMeta(noise=0.0, seed=0, source=origin))
    unfinished = f"; {left_out} steps of an unfinished episode left out" if left_out else ""
    tell(f"{task}: {len(demonstrations)} episodes from {origin}{unfinished}")


def _has(folder: Path, task: str, origin: str, horizon: int) -> bool:
    """Whether the folder has, whole, what is to be imported."""
    entry = _entries(folder).get(task)
    if entry is None or (entry.source, entry.horizon) != (origin, horizon):
        return False
    try:
        load_task(folder, task)
    except InputError:
        return False
    return True


def _refuse_collected(folder: Path) -> None:
    for task, entry in _entries(folder).items():
        if entry.source is None:
            raise InputError(
                f"{folder} holds demonstrations of {task} by the scripted expert, which are not mixed with others': "
                "choose another folder"
            )


def _entries(folder: Path) -> dict[str, TaskEntry]:
    return dict(read_index(folder).tasks) if (folder / INDEX).is_file() else {}
