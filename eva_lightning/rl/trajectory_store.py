"""The steps of demonstrations in memory-mapped files: built once, read as windows, one vectorised read per batch."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eva_lightning.arrays import map_array
from eva_lightning.errors import InputError, check_choice
from eva_lightning.files import digest, file_digest
from eva_lightning.reading import reading, typed
from eva_lightning.rl.demonstrations import DemonstrationIndex, TaskDemonstrations, load_task, read_index
from eva_lightning.rl.tasks import ACTION_DIM, STATE_DIM, resolve_task
from eva_lightning.rl.trajectory_arrays import Floats, Ints, Trajectories
from eva_lightning.sealed import read_sealed_json, write_sealed_json

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16")

#: A state is what is seen now, the same of the step before, and the goal.
_FRAME = 18
_FORMAT = 2
_ARRAYS = ("states", "actions", "scalars", "episodes")


class TrajectoryStore(Trajectories):
    """The steps of several tasks' demonstrations, one after the other, in memory-mapped files.

    Read as little or as often as wanted: the operating system keeps what is used in memory, once for all processes.

    Args:
        path: Folder made by :meth:`build`. All of it is compared with its checksums, once per process.

    Raises:
        MissingInputError, InputError: It is not complete, or damaged.

    Attributes:
        path: As given.
        drop_previous_frame: See :meth:`build`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        about = _read_about(self.path)
        self.drop_previous_frame = about.drop_previous_frame
        self._shapes = _shapes(about)
        self._open()
        starts, lengths, task_of = self._map("episodes")
        _check_episodes(self.path, starts, lengths, task_of, about)
        super().__init__(about.tasks, self._states, self._actions, self._scalars, starts, lengths, task_of)
        # a row may lack the frame before, and has the expert's action too
        self.state_dim, self.action_dim = STATE_DIM, ACTION_DIM

    def _open(self) -> None:
        self._states, self._actions, self._scalars = (self._map(name) for name in _ARRAYS[:3])

    def _map(self, name: str) -> npt.NDArray[Any]:
        with reading(self.path / f"{name}.npy"):
            return map_array(self.path / f"{name}.npy", *self._shapes[name])

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be sent to loader processes with its content
        return {name: value for name, value in vars(self).items() if name not in ("_states", "_actions", "_scalars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    @classmethod
    def build(
        cls,
        folder: str | Path,
        tasks: Sequence[str],
        cache_dir: str | Path | None = None,
        dtype: str = "float32",
        drop_previous_frame: bool = False,
    ) -> TrajectoryStore:
        """The store of `tasks` of a folder of demonstrations; built at the first call and when the files change.

        Args:
            folder: Folder of demonstrations.
            tasks: Names of tasks.
            cache_dir: Where stores are kept; ``folder/cache`` for None.
            dtype: ``"float16"`` halves states and actions (positions to half a millimetre); rewards stay float32.
            drop_previous_frame: Leave out dimensions 18 to 35 of the state, which repeat dimensions 0 to 17 of the
                step before, and put them back when reading: the same bits from 54% of the size.

        Raises:
            MissingInputError, InputError: See :func:`~eva_lightning.rl.demonstrations.load_task`; or a name is unknown.
        """
        check_choice("dtype", dtype, DTYPES)
        tasks = [resolve_task(task) for task in tasks]
        index = read_index(folder)
        about = {
            "format": _FORMAT,
            "tasks": tasks,
            "checksums": [index[task].sha256 for task in tasks],
            "dtype": dtype,
            "drop_previous_frame": drop_previous_frame,
        }
        cache = Path(folder) / "cache" if cache_dir is None else Path(cache_dir)
        path = cache / f"trajectories-{digest(about)}"
        found = cls._found(path)
        if found is not None:
            return found
        temporary = cache / f"{path.name}.{os.getpid()}.part"
        try:
            _write(temporary, index, about, np.dtype(dtype))
            if cls._found(path, remove=True) is None:  # another process may have been faster
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(path)

    @classmethod
    def _found(cls, path: Path, remove: bool = False) -> TrajectoryStore | None:
        """The store at `path`, or None where it is missing or damaged; `remove` a damaged one."""
        if not path.exists():
            return None
        try:
            return cls(path)
        except InputError as error:
            if remove:
                shutil.rmtree(path)
            else:
                logger.warning("the trajectories are prepared again: %s", error)
            return None

    def window(self, episode: int, first: int, steps: int) -> dict[str, npt.NDArray[Any]]:
        """As :meth:`Trajectories.window`, without ``states`` where the previous frame was left out."""
        views = super().window(episode, first, steps)
        return {name: view for name, view in views.items() if name != "states" or not self.drop_previous_frame}

    def _read_states(self, rows: Ints) -> Floats:
        if not self.drop_previous_frame:
            return super()._read_states(rows)
        stored = self._states.take(rows, axis=0, mode="clip")
        before = self._states[..., :_FRAME].take(rows - 1, axis=0, mode="clip")
        return np.concatenate((stored[..., :_FRAME], before, stored[..., _FRAME:]), axis=-1)


@dataclass(frozen=True)
class _About:
    """What ``store.json`` says; `files` has the SHA-256 of each array's file."""

    format: int
    tasks: tuple[str, ...]
    checksums: tuple[str, ...]
    dtype: str
    drop_previous_frame: bool
    rows: int
    episodes: int
    files: Mapping[str, str]


#: Stores whose files this process has compared with their checksums -> sizes and times they had then.
_verified: dict[Path, tuple[tuple[int, int, int], ...]] = {}


def _read_about(path: Path) -> _About:
    """``store.json``, once it and the files it describes are found whole.

    Raises:
        MissingInputError, InputError: They are not.
    """
    file = path / "store.json"
    with reading(file):
        about = typed(_About, read_sealed_json(file), file)
        if about.format != _FORMAT or about.dtype not in DTYPES:
            raise InputError(f"{file} is of another version of the project")
        parts = [path / f"{name}.npy" for name in _ARRAYS]
        stats = [part.stat() for part in parts]
        state = tuple((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in stats)
        if _verified.get(path) != state:
            for part in parts:
                if file_digest(part) != about.files[part.stem]:
                    raise InputError(f"{part} is damaged: its checksum is another")
            _verified[path] = state
    return about


def _shapes(about: _About) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Array -> its shape and type."""
    dtype, single = np.dtype(about.dtype), np.dtype(np.float32)
    width = STATE_DIM - _FRAME if about.drop_previous_frame else STATE_DIM
    return {
        "states": ((about.rows, width), dtype),
        "actions": ((about.rows, 2 * ACTION_DIM), dtype),
        "scalars": ((about.rows, 2), single),
        "episodes": ((3, about.episodes), np.dtype(np.int64)),
    }


def _check_episodes(path: Path, starts: Ints, lengths: Ints, task_of: Ints, about: _About) -> None:
    within = (starts >= 0) & (lengths > 0) & (starts <= about.rows - lengths)
    if not (within & (task_of >= 0) & (task_of < len(about.tasks))).all():
        raise InputError(f"{path} is damaged: an episode lies outside of it")


def _write(path: Path, index: DemonstrationIndex, about: dict[str, Any], dtype: np.dtype[Any]) -> None:
    """Write the arrays of a store, task by task, so that memory holds one task at a time, and ``store.json``."""
    path.mkdir(parents=True)
    tasks, drop = about["tasks"], about["drop_previous_frame"]
    # without its previous frame, a state needs the row before it: one more row ahead of each episode
    lead = int(drop)
    n_rows = sum(index[task].episodes * (index[task].horizon + lead) for task in tasks)
    n_episodes = sum(index[task].episodes for task in tasks)
    whole = {**about, "rows": n_rows, "episodes": n_episodes, "files": {}}
    shapes = _shapes(_About(**whole))
    files = {
        name: np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
        for name, (shape, kind) in shapes.items()
    }
    episode = row = 0
    for number, task in enumerate(tasks):
        data = load_task(index.folder, task)
        n, t = len(data), data.horizon
        rows = slice(row, row + n * (t + lead))
        to_go = data.rewards[:, ::-1].cumsum(axis=1, dtype=np.float64)[:, ::-1]  # (N, T)
        values = {
            "states": _frames(data) if drop else data.observations[:, :t],
            "actions": np.concatenate((data.actions, data.expert_actions), axis=-1),
            "scalars": np.stack((data.rewards, to_go), axis=-1),
        }
        for name, array in values.items():
            padded = np.pad(array, ((0, 0), (t + lead - array.shape[1], 0), (0, 0)))  # (N, lead + T, ...)
            files[name][rows] = padded.reshape(-1, array.shape[-1])
        starts = row + lead + (t + lead) * np.arange(n)
        files["episodes"][:, episode : episode + n] = np.stack((starts, np.full(n, t), np.full(n, number)))
        row, episode = rows.stop, episode + n
    for file in files.values():
        file.flush()
    whole["files"] = {name: file_digest(path / f"{name}.npy") for name in _ARRAYS}
    write_sealed_json(path / "store.json", whole)


def _frames(data: TaskDemonstrations) -> npt.NDArray[np.float32]:
    """``(N, T + 1, 21)``: current frame and goal of each state, after a row with the first state's previous frame."""
    states = data.observations[:, : data.horizon]
    if not np.array_equal(states[:, 1:, _FRAME : 2 * _FRAME], states[:, :-1, :_FRAME]):
        raise InputError(f"{data.task}: states do not repeat the frame before, so it cannot be left out")
    kept = np.concatenate((states[..., :_FRAME], states[..., 2 * _FRAME :]), axis=-1)
    first = np.pad(states[:, :1, _FRAME : 2 * _FRAME], ((0, 0), (0, 0), (0, kept.shape[-1] - _FRAME)))
    return np.concatenate((first, kept), axis=1)
