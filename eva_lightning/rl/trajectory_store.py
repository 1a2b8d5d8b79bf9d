"""The steps of demonstrations in memory-mapped files: built once, read as windows, one vectorised read per batch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eva_lightning.errors import InputError, check_choice
from eva_lightning.files import digest, write_json
from eva_lightning.rl.demonstrations import DemonstrationIndex, TaskDemonstrations, load_task, read_index
from eva_lightning.rl.tasks import ACTION_DIM, STATE_DIM, resolve_task

Ints = npt.NDArray[np.int64]
Batch = dict[str, Tensor]

DTYPES = ("float32", "float16")

#: A state is what is seen now, the same of the step before, and the goal.
_FRAME = 18
_FORMAT = 1
_ARRAYS = ("states", "actions", "scalars", "episodes")


class TrajectoryStore:
    """The steps of several tasks' demonstrations, one after the other, in memory-mapped files.

    Read as little or as often as wanted: the operating system keeps what is used in memory, once for all processes.

    Args:
        path: Folder made by :meth:`build`.

    Attributes:
        tasks: Names of the tasks.
        starts, lengths: ``(n_episodes,)`` first row and number of steps of each episode.
        task_of: ``(n_episodes,)`` index into `tasks`.
        returns: ``(n_episodes,)`` float64, undiscounted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        about = json.loads((self.path / "store.json").read_text(encoding="utf-8"))
        self.tasks: tuple[str, ...] = tuple(about["tasks"])
        self.drop_previous_frame: bool = about["drop_previous_frame"]
        self._open()
        self.starts, self.lengths, self.task_of = np.load(self.path / "episodes.npy")
        # the return-to-go of an episode's first step
        self.returns = self._scalars[self.starts, 1].astype(np.float64)

    def _open(self) -> None:
        self._states, self._actions, self._scalars = (
            np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS[:3]
        )

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be sent to loader processes with its content
        return {name: value for name, value in vars(self).items() if name not in ("_states", "_actions", "_scalars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.starts)

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
        if not (path / "store.json").is_file():
            temporary = cache / f"{path.name}.{os.getpid()}.part"
            try:
                _write(temporary, index, tasks, np.dtype(dtype), drop_previous_frame)
                write_json(temporary / "store.json", about)
                if not path.exists():  # another process may have been faster
                    temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls(path)

    def states(self, episode: int) -> npt.NDArray[np.floating]:
        """States ``(T, 39)`` of an episode: a view of the file, unless the previous frame was left out."""
        return self._read_states(np.arange(self.starts[episode], self.starts[episode] + self.lengths[episode]))

    def window(self, episode: int, first: int, steps: int) -> dict[str, npt.NDArray[Any]]:
        """Steps of an episode as views of the files, nothing copied: ``actions`` and ``target_actions`` ``(n, 4)``,
        ``rewards`` and ``returns_to_go`` ``(n,)`` and, unless the previous frame was left out, ``states`` ``(n, 39)``.

        Args:
            episode: Number of the episode.
            first: First step.
            steps: Number of steps; fewer come at the end of the episode.
        """
        begin = int(self.starts[episode]) + first
        rows = slice(begin, min(begin + steps, int(self.starts[episode] + self.lengths[episode])))
        views = {
            "actions": self._actions[rows, :ACTION_DIM],
            "target_actions": self._actions[rows, ACTION_DIM:],
            "rewards": self._scalars[rows, 0],
            "returns_to_go": self._scalars[rows, 1],
        }
        return views if self.drop_previous_frame else {"states": self._states[rows], **views}

    def gather(self, episodes: Ints, first: Ints, lengths: Ints, context: int, target: str = "executed") -> Batch:
        """Windows as one batch, float32, left-aligned: padding, all zeros, comes after the real steps.

        Args:
            episodes: ``(B,)`` episode of each window.
            first: ``(B,)`` first step of each window within its episode.
            lengths: ``(B,)`` real steps of each window.
            context: Steps of a window, K.
            target: ``"expert"`` adds the expert's clean actions.

        Returns:
            ``states`` ``(B, K, 39)``, ``actions`` ``(B, K, 4)``, ``rewards``, ``returns_to_go`` ``(B, K)`` float32,
            ``timesteps`` ``(B, K)`` int64, ``mask`` ``(B, K)`` bool and, for ``"expert"``, ``target_actions``.
        """
        steps = np.arange(context)  # (K,)
        mask = steps < lengths[:, None]  # (B, K)
        rows = (self.starts[episodes] + first)[:, None] + steps  # (B, K)
        states = self._read_states(rows)  # (B, K, 39)
        actions = self._actions.take(rows, axis=0, mode="clip")  # (B, K, 4 executed + 4 of the expert)
        scalars = self._scalars.take(rows, axis=0, mode="clip")  # (B, K, reward and return-to-go)
        timesteps = first[:, None] + steps  # (B, K)
        if not mask.all():
            for array in (states, actions, scalars, timesteps):
                array[~mask] = 0
        batch = {
            "states": states,
            "actions": actions[..., :ACTION_DIM],
            "rewards": scalars[..., 0],
            "returns_to_go": scalars[..., 1],
            "timesteps": timesteps,
            "mask": mask,
        }
        if target == "expert":
            batch["target_actions"] = actions[..., ACTION_DIM:]
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def _read_states(self, rows: Ints) -> npt.NDArray[np.floating]:
        if not self.drop_previous_frame:
            states: npt.NDArray[np.floating] = self._states.take(rows, axis=0, mode="clip")
            return states
        stored = self._states.take(rows, axis=0, mode="clip")
        before = self._states[..., :_FRAME].take(rows - 1, axis=0, mode="clip")
        return np.concatenate((stored[..., :_FRAME], before, stored[..., _FRAME:]), axis=-1)


def _write(path: Path, index: DemonstrationIndex, tasks: Sequence[str], dtype: np.dtype[Any], drop: bool) -> None:
    """Write the arrays of a store, task by task, so that memory holds one task at a time."""
    path.mkdir(parents=True)
    # without its previous frame, a state needs the row before it: one more row ahead of each episode
    lead = int(drop)
    n_rows = sum(index[task].episodes * (index[task].horizon + lead) for task in tasks)
    files = _new_files(path, n_rows, STATE_DIM - _FRAME if drop else STATE_DIM, dtype)
    episodes, row = [], 0
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
        episodes.append(np.stack((starts, np.full(n, t), np.full(n, number))))
        row = rows.stop
    for file in files.values():
        file.flush()
    np.save(path / "episodes.npy", np.concatenate(episodes, axis=1).astype(np.int64))


def _new_files(path: Path, rows: int, width: int, dtype: np.dtype[Any]) -> dict[str, np.memmap[Any, Any]]:
    columns = {"states": (width, dtype), "actions": (2 * ACTION_DIM, dtype), "scalars": (2, np.dtype(np.float32))}
    return {
        name: np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=kind, shape=(rows, n))
        for name, (n, kind) in columns.items()
    }


def _frames(data: TaskDemonstrations) -> npt.NDArray[np.float32]:
    """``(N, T + 1, 21)``: current frame and goal of each state, after a row with the first state's previous frame."""
    states = data.observations[:, : data.horizon]
    if not np.array_equal(states[:, 1:, _FRAME : 2 * _FRAME], states[:, :-1, :_FRAME]):
        raise InputError(f"{data.task}: states do not repeat the frame before, so it cannot be left out")
    kept = np.concatenate((states[..., :_FRAME], states[..., 2 * _FRAME :]), axis=-1)
    first = np.pad(states[:, :1, _FRAME : 2 * _FRAME], ((0, 0), (0, 0), (0, kept.shape[-1] - _FRAME)))
    return np.concatenate((first, kept), axis=1)
