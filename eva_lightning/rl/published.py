"""The trajectories that Schmied et al. (2024) published for Meta-World, as demonstrations of this project.

Source: "Learning to Modulate pre-trained Models in RL", ``ml-jku/L2M`` and ``ml-jku/LRAM`` on GitHub, data set
``ml-jku/meta-world`` of the Hugging Face hub. Their readers (``src/buffers/trajectory_buffer.py``,
``src/buffers/buffer_utils.py``, ``src/data/prepare_datasets.py``) take, for a task such as ``push-v2``:

- ``push-v2.pkl``: a pickled ``ReplayBuffer`` of stable-baselines3 (attributes ``observations``, ``next_observations``,
  ``actions``, ``rewards``, ``dones``, ``pos``, ``full``; an axis of length 1 for environments behind the first), or a
  list of mappings with ``observations``, ``actions``, ``rewards``, ``terminals``;
- ``push-v2.npz``: arrays of those names, all steps one after the other;
- ``push-v2/*.npz``, ``*.hdf5`` or ``*.pkl``: an episode each, with ``states``, ``actions`` and ``rewards``;
- archives of these (``push-v2.tar.gz``).

Episodes have 200 steps; steps behind the last finished episode are left out, as there.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from eva_lightning.arrays import arrays_from_npz
from eva_lightning.errors import InputError
from eva_lightning.files import format_bytes
from eva_lightning.reading import read_bytes, reading
from eva_lightning.rl.demonstrations import TaskDemonstrations
from eva_lightning.rl.plain_pickle import Inert, array_of, load_pickle
from eva_lightning.rl.tasks import ACTION_DIM, STATE_DIM

Array = npt.NDArray[Any]

#: Bytes of the largest file that is read: ten times a task's 2M transitions.
_LARGEST = 8 * 2**30
#: How far actions may lie outside of [-1, 1], by rounding.
_ROUNDING = 1e-4

#: Data is never packed to a hundredth; content of so many bytes may be.
_MOST_RATIO, _HARMLESS = 100, 64 * 2**20

#: Kinds of files, the first preferred where a task has several.
SUFFIXES = (".npz", ".hdf5", ".pkl")
ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class Steps:
    """Steps of one or several episodes, one after the other.

    Attributes:
        states: ``(n, 39)``.
        actions: ``(n, 4)``.
        rewards: ``(n,)``.
        ends: ``(n,)`` bool, True at the last step of each episode.
        following: ``(n, 39)`` the states after the actions; None where the source does not have them.
        successes: ``(n,)`` bool; None where the source does not have them.
    """

    states: Array
    actions: Array
    rewards: Array
    ends: Array
    following: Array | None = None
    successes: Array | None = None


def files_of(task: str, names: Sequence[str]) -> list[str]:
    """Those of the files `names` that hold the published trajectories of `task`; none if there are none.

    One file called as the task is in metaworld 2, or else all episodes in a folder called so.

    Args:
        task: Task, such as ``push-v3``.
        names: Paths with slashes, relative to the data set's folder.
    """
    stem = published_name(task)
    for ending in (*SUFFIXES, *ARCHIVES):
        found = [name for name in names if PurePosixPath(name).name == stem + ending]
        if found:
            return [min(found, key=lambda name: (name.count("/"), name))]
    for ending in SUFFIXES:
        found = [name for name in names if stem in PurePosixPath(name).parts[:-1] and name.endswith(ending)]
        if found:
            return sorted(found)
    return []


def published_name(task: str) -> str:
    """``push-v2`` for ``push-v3``: the data set is of metaworld 2."""
    return f"{task.removesuffix('-v3')}-v2"


def read_published(
    task: str, files: Sequence[Path], *, horizon: int = 200, episodes: int | None = None
) -> tuple[TaskDemonstrations, int]:
    """Published trajectories as demonstrations.

    The expert's actions are the executed ones, goals have no number, and success is unknown where the files do not
    say. Files of single episodes lack the observation after the last action: there the one before is repeated.

    Args:
        task: Task, such as ``push-v3``.
        files: From :func:`files_of`, in order.
        horizon: Steps that every episode must have.
        episodes: Only the first so many; None for all.

    Returns:
        The demonstrations, and the number of steps that belong to no finished episode and were left out.

    Raises:
        MissingInputError: A file is missing.
        InputError: A file is damaged, or an episode has another shape or length than expected; names the file.
    """
    parts: list[TaskDemonstrations] = []
    left_out = have = 0
    for path in files:
        for name, steps in _parts(path):
            found, rest = _episodes(task, name, steps, horizon)
            parts, left_out, have = [*parts, found], left_out + rest, have + len(found)
            if episodes is not None and have >= episodes:
                break
        if episodes is not None and have >= episodes:
            break
    if have == 0:
        raise InputError(f"{files[0]} has no finished episode of {task}")
    if episodes is not None and have < episodes:
        raise InputError(f"{files[0].parent} has {have} episodes of {task}, and {episodes} were asked for")
    return _joined(parts).episodes(stop=episodes), left_out


def _joined(parts: Sequence[TaskDemonstrations]) -> TaskDemonstrations:
    known = all(part.successes.shape[1] for part in parts)
    names = ("observations", "actions", "expert_actions", "rewards", "goals")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    count = len(arrays["goals"])
    arrays["successes"] = (
        np.concatenate([part.successes for part in parts]) if known else np.zeros((count, 0), dtype=np.bool_)
    )
    return TaskDemonstrations(parts[0].task, **arrays)


def _parts(path: Path) -> Iterator[tuple[str, Steps]]:
    """The content of a file, by the name of what is blamed for errors."""
    if path.name.endswith(ARCHIVES):
        with reading(path, what="archive"):
            content = list(_members(path))
        for member, data in sorted(content):
            with reading(f"{path}: {member}"):
                steps = _parsed(member, data)
            yield f"{path}: {member}", steps
        return
    data = read_bytes(path, _LARGEST, what="file of trajectories")
    with reading(path, what="file of trajectories"):
        steps = _parsed(path.name, data)
    yield str(path), steps


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isreg() or not member.name.endswith(SUFFIXES):
                continue
            total += member.size
            if total > _LARGEST:
                raise InputError(f"{path} unpacks to more than {format_bytes(_LARGEST)}")
            file = archive.extractfile(member)
            assert file is not None  # of a regular file
            yield member.name, file.read()


def _parsed(name: str, data: bytes) -> Steps:
    if name.endswith(".npz"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [each.removesuffix(".npy") for each in archive.namelist()]
        return _steps(arrays_from_npz(data, [each for each in names if each in _WANTED]))
    if name.endswith(".hdf5"):
        with h5py.File(io.BytesIO(data), "r") as file:
            return _steps({each: _read_dataset(file[each], len(data)) for each in file if each in _WANTED})
    found = load_pickle(data)
    if isinstance(found, list | tuple):
        return _concatenated([_steps(_arrays(each)) for each in found])
    if isinstance(found, Inert) and "pos" in vars(found):
        steps = _steps(_arrays(found))
        return steps if vars(found).get("full") else _first(steps, max(0, int(vars(found)["pos"])))
    return _steps(_arrays(found))


def _read_dataset(dataset: Any, size: int) -> Array:
    """An array of an HDF5 file of `size` bytes, which may promise more than data is ever packed to."""
    if dataset.dtype.kind not in "biuf":
        raise InputError(f"{dataset.name} holds other things than numbers")
    if dataset.nbytes > max(_HARMLESS, _MOST_RATIO * size):
        raise InputError(f"it would unpack to {format_bytes(dataset.nbytes)}")
    return np.asarray(dataset[()])


#: What arrays are called: in buffers, and in files of one episode.
_STATES = ("observations", "states")
_ENDS = ("dones", "terminals")
_SUCCESSES = ("successes", "success")
_WANTED = (*_STATES, *_ENDS, *_SUCCESSES, "next_observations", "actions", "rewards")


def _arrays(found: Any) -> dict[str, Array]:
    held = found if isinstance(found, dict) else vars(found) if isinstance(found, Inert) else None
    if held is None:
        raise InputError(f"it holds {type(found).__name__} where trajectories are expected")
    return {name: array_of(value) for name, value in held.items() if name in _WANTED and value is not None}


def _steps(arrays: Mapping[str, Array]) -> Steps:
    def named(names: Sequence[str], width: int | None, needed: bool = True) -> Array | None:
        name = next((each for each in names if each in arrays), None)
        if name is None:
            if needed:
                raise InputError(f"it has no array {' or '.join(names)}")
            return None
        return _rows(name, arrays[name], width)

    states, actions = named(_STATES, STATE_DIM), named(("actions",), ACTION_DIM)
    rewards, following = named(("rewards",), None), named(("next_observations",), STATE_DIM, needed=False)
    successes = named(_SUCCESSES, None, needed=False)
    assert states is not None
    assert actions is not None
    assert rewards is not None
    ends = None
    one = "states" in arrays and "observations" not in arrays
    if not one:
        ends = named(_ENDS, None)
    if ends is None:  # an episode: whether it ended says one number, or nothing
        ends = np.arange(len(states)) == len(states) - 1
    found = {"actions": actions, "rewards": rewards, "dones": ends, "next_observations": following}
    for name, array in {**found, "successes": successes}.items():
        if array is not None and len(array) != len(states):
            raise InputError(f"it has {len(states)} states and {len(array)} {name}")
    return Steps(states, actions, rewards, ends != 0, following, None if successes is None else successes != 0)


def _rows(name: str, array: Array, width: int | None) -> Array:
    """`array` as ``(n,)`` or ``(n, width)``, without the axis of a single environment."""
    expected = 1 if width is None else 2
    if array.ndim == expected + 1 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != expected or (width is not None and array.shape[1] != width):
        wanted = "(steps,)" if width is None else f"(steps, {width})"
        raise InputError(f"{name} must have shape {wanted}, got {array.shape}")
    return array


def _single(array: Array) -> Array:
    """Numbers in single precision; truth values as they are."""
    return array if array.dtype == np.bool_ else array.astype(np.float32)


def _first(steps: Steps, count: int) -> Steps:
    return _changed(steps, lambda array: array[:count])


def _changed(steps: Steps, change: Callable[[Array], Array]) -> Steps:
    arrays: dict[str, Any] = {name: None if array is None else change(array) for name, array in vars(steps).items()}
    return Steps(**arrays)


def _concatenated(parts: Sequence[Steps]) -> Steps:
    if not parts:
        raise InputError("it holds no trajectory")
    found = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    arrays: dict[str, Any] = {
        name: None if any(each is None for each in arrays) else np.concatenate(arrays) for name, arrays in found.items()
    }
    return Steps(**arrays)


def _episodes(task: str, name: str, steps: Steps, horizon: int) -> tuple[TaskDemonstrations, int]:
    """The finished episodes, and how many steps follow the last one."""
    last = np.flatnonzero(steps.ends)
    lengths = np.diff(last, prepend=-1)
    wrong = np.flatnonzero(lengths != horizon)
    if len(wrong):
        raise InputError(
            f"{name}: episode {wrong[0]} has {lengths[wrong[0]]} steps, and {horizon} are expected: episodes of other "
            "lengths are not imported"
        )
    n = len(last)
    with np.errstate(over="ignore"):
        whole = _changed(_first(steps, n * horizon), _single)
    for what, array in (("states", whole.states), ("actions", whole.actions), ("rewards", whole.rewards)):
        finite = np.isfinite(array).reshape(n, array[0:1].size * horizon).all(axis=1)
        if not finite.all():
            raise InputError(f"{name}: the {what} of episode {np.flatnonzero(~finite)[0]} are not finite")
    if n and np.abs(whole.actions).max() > 1 + _ROUNDING:
        largest = np.abs(whole.actions).max()
        raise InputError(f"{name}: actions must lie in [-1, 1], and there is one of {largest:g}")
    states = whole.states.reshape(n, horizon, STATE_DIM)
    after = states if whole.following is None else whole.following.reshape(n, horizon, STATE_DIM)
    actions = np.clip(whole.actions, -1, 1).reshape(n, horizon, ACTION_DIM)
    demonstrations = TaskDemonstrations(
        task,
        observations=np.concatenate((states, after[:, -1:]), axis=1),
        actions=actions,
        expert_actions=actions,
        rewards=whole.rewards.reshape(n, horizon),
        successes=(
            np.zeros((n, 0), dtype=np.bool_) if whole.successes is None else whole.successes.reshape(n, horizon)
        ),
        goals=np.full(n, -1, dtype=np.int64),
    )
    return demonstrations, len(steps.ends) - n * horizon
