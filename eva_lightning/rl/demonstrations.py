"""Demonstrations on disk: one compressed ``.npz`` file per task and ``index.json``, which says what is in them.

A new file gets a name that the index does not use yet; then the index is replaced; then the old file is deleted. A
reader at any moment, or after a crash at any moment, finds an index and the files it describes. The same demonstrations
give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eva_lightning.arrays import arrays_from_npz
from eva_lightning.errors import InputError, MissingInputError, check_number
from eva_lightning.files import file_digest, replacing
from eva_lightning.names import check_name, shown
from eva_lightning.reading import read_bytes, reading, typed
from eva_lightning.rl.tasks import ACTION_DIM, STATE_DIM, resolve_task
from eva_lightning.sealed import read_sealed_json, write_sealed_json

INDEX = "index.json"
_FORMAT = 1
#: Bytes of the largest file that is read: 100,000 episodes, packed.
_LARGEST = 8 * 2**30
_ARRAYS = ("observations", "actions", "expert_actions", "rewards", "successes", "goals")
_COLLECT = "eva-lightning metaworld collect --tasks {task} --out {folder}"


@dataclass(frozen=True, eq=False)
class TaskDemonstrations:
    """N episodes of T steps of one task.

    Attributes:
        task: Full name of the task.
        observations: ``(N, T + 1, 39)`` float32; the last one follows the last action.
        actions: ``(N, T, 4)`` float32, as executed: in [-1, 1], with noise.
        expert_actions: ``(N, T, 4)`` float32, what the expert wanted at the same observation: in [-1, 1], no noise.
        rewards: ``(N, T)`` float32, for the action of the same step.
        successes: ``(N, T)`` bool, whether the task was solved after the action of the same step; ``(N, 0)`` where that
            is not known.
        goals: ``(N,)`` int64, numbers of the training goals; -1 for goals without a number.
    """

    task: str
    observations: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    expert_actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    successes: npt.NDArray[np.bool_]
    goals: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.actions.ndim != 3:
            raise InputError(f"{self.task}: actions have shape (N, T, {ACTION_DIM}), got {self.actions.shape}")
        n, steps = self.actions.shape[:2]
        expected: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "observations": ((n, steps + 1, STATE_DIM), np.float32),
            "actions": ((n, steps, ACTION_DIM), np.float32),
            "expert_actions": ((n, steps, ACTION_DIM), np.float32),
            "rewards": ((n, steps), np.float32),
            "successes": ((n, steps), np.bool_),
            "goals": ((n,), np.int64),
        }
        for name, (shape, dtype) in expected.items():
            array = getattr(self, name)
            unknown = name == "successes" and array.shape == (n, 0)
            if (array.shape != shape and not unknown) or array.dtype != dtype:
                wanted = f"{np.dtype(dtype)} {shape}"
                raise InputError(f"{self.task}: {name} must be {wanted}, got {array.dtype} {array.shape}")

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def horizon(self) -> int:
        """Steps per episode."""
        return int(self.actions.shape[1])

    @property
    def returns(self) -> npt.NDArray[np.float64]:
        """``(N,)``: undiscounted sum of the rewards of each episode."""
        return self.rewards.sum(axis=1, dtype=np.float64)

    @property
    def knows_success(self) -> bool:
        """Whether it is known which steps were solved."""
        return len(self) > 0 and self.successes.shape[1] > 0

    @property
    def success_rate(self) -> float:
        """Share of the episodes that were solved at any step; NaN where it is not known."""
        return float(self.successes.any(axis=1).mean()) if self.knows_success else float("nan")

    @property
    def final_success_rate(self) -> float:
        """Share of the episodes that were solved at their last step; NaN where it is not known."""
        return float(self.successes[:, -1].mean()) if self.knows_success else float("nan")

    def episodes(self, start: int = 0, stop: int | None = None) -> TaskDemonstrations:
        """Episodes `start` to `stop` (excluded), without copying them."""
        return TaskDemonstrations(self.task, **{name: getattr(self, name)[start:stop] for name in _ARRAYS})


def join(parts: list[TaskDemonstrations]) -> TaskDemonstrations:
    """The episodes of all `parts`, which are of one task and horizon, in order."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
    return TaskDemonstrations(parts[0].task, **arrays)


@dataclass(frozen=True)
class DemonstrationMeta:
    """How demonstrations were made: what two collections must share to be put together.

    Attributes:
        noise: Standard deviation of the Gaussian noise on the expert's actions.
        seed: Seed of goals and noise.
        versions: Package -> version that produced the first episode.
        source: Where others' demonstrations were taken from; None for those of the scripted experts.
    """

    noise: float
    seed: int
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None


@dataclass(frozen=True)
class TaskEntry:
    """What the index says about one task.

    Attributes:
        file: Name of its file, within the folder.
        sha256: Checksum of that file.
        episodes: Number of episodes.
        horizon: Steps per episode.
        noise, seed, versions, source: See :class:`DemonstrationMeta`.
        success_rate: Share of the episodes that were solved at any step; None where it is not known.
        mean_return, max_return: Over the episodes, undiscounted.
        final_success_rate: Share of the episodes that were solved at their last step; None where it is not known.
    """

    file: str
    sha256: str
    episodes: int
    horizon: int
    noise: float
    seed: int
    success_rate: float | None
    mean_return: float
    max_return: float
    versions: Mapping[str, str]
    final_success_rate: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class DemonstrationIndex:
    """The tasks of a folder of demonstrations, by name in alphabetical order."""

    folder: Path
    tasks: Mapping[str, TaskEntry]

    def __contains__(self, task: object) -> bool:
        return task in self.tasks

    def __iter__(self) -> Iterator[str]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: str) -> TaskEntry:
        """The entry of `task`.

        Raises:
            MissingInputError: The folder has no such demonstrations; says how to get them.
        """
        if task not in self.tasks:
            have = f"it has {', '.join(self.tasks)}" if self.tasks else "it has none"
            if len(self.tasks) > 6:
                have = f"it has {len(self.tasks)} other tasks"
            command = _COLLECT.format(task=task, folder=self.folder)
            raise MissingInputError(
                f"no demonstrations of {task} in {self.folder} ({have}): collect them with {command}"
            )
        return self.tasks[task]


def read_index(folder: str | Path) -> DemonstrationIndex:
    """The index of a folder of demonstrations.

    Raises:
        MissingInputError: There is none; says how to make one.
        InputError: It is damaged, of a later version of this project, or names a file outside the folder.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        command = _COLLECT.format(task="mt40", folder=folder)
        raise MissingInputError(f"no demonstrations in {folder} ({INDEX} is missing): collect them with {command}")
    remedy = "move it away and collect again, or use another folder"
    content = read_sealed_json(path)
    with reading(path, remedy):
        version = content["format"]
        if type(version) is not int or version != _FORMAT:
            raise InputError(f"{path} has format {shown(version)}, this version of the project reads format {_FORMAT}")
        tasks = {task: typed(TaskEntry, entry, path) for task, entry in sorted(content["tasks"].items())}
        for task, entry in tasks.items():
            check_name(f"{path}: task", task)
            check_name(f"{path}: file of {shown(task)}", entry.file)
            for name, value in (("episodes", entry.episodes), ("horizon", entry.horizon)):
                check_number(f"{path}: {name} of {task}", value, at_least=1, at_most=2**31, whole=True)
    return DemonstrationIndex(Path(folder), tasks)


def load_task(folder: str | Path, task: str, episodes: int | None = None) -> TaskDemonstrations:
    """The demonstrations of one task, checked against the index.

    Args:
        folder: Folder of demonstrations.
        task: Task, such as ``push-v3``.
        episodes: Only the first so many.

    Raises:
        MissingInputError: Folder, task or file is missing.
        InputError: The file is not the one the index describes, or has too few episodes.
    """
    task = resolve_task(task)
    entry = read_index(folder)[task]
    if episodes is not None and not 1 <= episodes <= entry.episodes:
        raise InputError(f"{folder} has {entry.episodes} episodes of {task}, asked for {episodes}")
    path = Path(folder) / entry.file
    again = f"make it again with {_COLLECT.format(task=task, folder=folder)} --episodes {entry.episodes}"
    if not path.is_file():
        raise MissingInputError(f"demonstration file {path} is missing: {again}")
    content = read_bytes(path, _LARGEST, again, "demonstration file")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise InputError(f"demonstration file {path} is damaged (its SHA-256 is not the one in {INDEX}): {again}")
    return decode(task, content, path).episodes(stop=episodes)


def decode(task: str, content: bytes, path: str | Path | None = None) -> TaskDemonstrations:
    """Demonstrations from the bytes of a file; its name, if there is one, is for the error.

    Raises:
        InputError: They are not the bytes of a file of demonstrations.
    """
    with reading(f"of {task}" if path is None else path, what="demonstration file"):
        return TaskDemonstrations(task, **arrays_from_npz(content, _ARRAYS))


def encode(demonstrations: TaskDemonstrations, compress: bool = True) -> bytes:
    """The bytes of a file; the same for the same demonstrations."""
    buffer = io.BytesIO()
    save = np.savez_compressed if compress else np.savez
    save(buffer, **{name: getattr(demonstrations, name) for name in _ARRAYS})
    return buffer.getvalue()


def write_task(folder: str | Path, demonstrations: TaskDemonstrations, meta: DemonstrationMeta) -> TaskEntry:
    """Write, or replace, the demonstrations of one task and note them in the index.

    Only one process may write into a folder at a time.

    Args:
        folder: Folder of demonstrations, created if needed.
        demonstrations: At least one episode.
        meta: How they were made.

    Raises:
        InputError: There is no episode, or the folder's index is damaged.
    """
    if not len(demonstrations):
        raise InputError(f"no episode of {demonstrations.task} to write")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = dict(read_index(folder).tasks) if (folder / INDEX).is_file() else {}
    task, content = demonstrations.task, encode(demonstrations)
    sha256 = hashlib.sha256(content).hexdigest()
    before = tasks.get(task)
    name = _free_name(folder, task, sha256)
    returns = demonstrations.returns
    entry = TaskEntry(
        file=name,
        sha256=sha256,
        episodes=len(demonstrations),
        horizon=demonstrations.horizon,
        noise=meta.noise,
        seed=meta.seed,
        success_rate=demonstrations.success_rate if demonstrations.knows_success else None,
        mean_return=float(returns.mean()),
        max_return=float(returns.max()),
        versions=dict(meta.versions),
        final_success_rate=demonstrations.final_success_rate if demonstrations.knows_success else None,
        source=meta.source,
    )
    with replacing(folder / name) as temporary:
        temporary.write_bytes(content)
    tasks[task] = entry
    entries = {name: asdict(tasks[name]) for name in sorted(tasks)}
    write_sealed_json(folder / INDEX, {"format": _FORMAT, "tasks": entries})
    if before is not None and before.file != name and _is_file_of(task, before.file):
        (folder / before.file).unlink(missing_ok=True)
    return entry


def _is_file_of(task: str, name: str) -> bool:
    """Whether this project gives such names to files of `task`: an index that others have written deletes nothing."""
    return re.fullmatch(rf"{re.escape(task)}(-[0-9a-f]{{8,64}})?\.npz", name) is not None


def _free_name(folder: Path, task: str, sha256: str) -> str:
    """A name for a file of `task` with this content, which no other content has."""
    for name in (f"{task}.npz", f"{task}-{sha256[:8]}.npz"):
        file = folder / name
        if not (file.exists() or file.is_symlink()) or (file.is_file() and file_digest(file) == sha256):
            return name
    return f"{task}-{sha256}.npz"
