"""Small files in the formats that the readers of ml-jku/L2M and ml-jku/LRAM take, with made-up episodes."""

from __future__ import annotations

import io
import pickle
import sys
import tarfile
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

Arrays = dict[str, np.ndarray]

#: Steps of an episode; theirs have 200.
HORIZON = 6


def episodes(count: int = 3, seed: int = 0, horizon: int = HORIZON) -> list[Arrays]:
    """Episodes as one array per quantity: ``observations`` ``(T + 1, 39)``, ``actions``, ``rewards``."""
    rng = np.random.default_rng(seed)
    return [
        {
            "observations": rng.normal(size=(horizon + 1, 39)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (horizon, 4)).astype(np.float32),
            "rewards": rng.uniform(0, 10, horizon).astype(np.float32),
        }
        for _ in range(count)
    ]


def stream(found: list[Arrays], rest: int = 0) -> Arrays:
    """All steps one after the other, as stable-baselines3 has them, and `rest` steps of an unfinished episode."""
    dones = [np.arange(len(each["rewards"])) == len(each["rewards"]) - 1 for each in found]
    arrays = {
        "observations": np.concatenate([each["observations"][:-1] for each in found])[:, None],
        "next_observations": np.concatenate([each["observations"][1:] for each in found])[:, None],
        "actions": np.concatenate([each["actions"] for each in found])[:, None],
        "rewards": np.concatenate([each["rewards"] for each in found])[:, None],
        "dones": np.concatenate(dones).astype(np.float32)[:, None],
    }
    return {name: np.concatenate((array, np.zeros_like(array[:rest]))) for name, array in arrays.items()}


@contextmanager
def their_classes() -> Iterator[Any]:
    """Modules of stable-baselines3 and gym, that are gone again when a file is read."""
    buffers, spaces = types.ModuleType("stable_baselines3.common.buffers"), types.ModuleType("gym.spaces.box")
    modules = {"stable_baselines3": types.ModuleType("stable_baselines3"), "gym": types.ModuleType("gym")}
    modules |= {"stable_baselines3.common": types.ModuleType("common"), buffers.__name__: buffers}
    modules |= {"gym.spaces": types.ModuleType("spaces"), spaces.__name__: spaces}
    for module, name in ((buffers, "ReplayBuffer"), (spaces, "Box")):
        setattr(module, name, type(name, (), {"__module__": module.__name__}))
    sys.modules.update(modules)
    try:
        yield buffers.ReplayBuffer, spaces.Box  # type: ignore[attr-defined]
    finally:
        for name in modules:
            del sys.modules[name]


def replay_buffer(path: Path, arrays: Arrays, protocol: int = 5, full: bool = False) -> None:
    """A pickled ``ReplayBuffer`` with room for more steps than it has."""
    count = len(arrays["rewards"])
    with their_classes() as (buffer_class, box_class):
        buffer, box = buffer_class(), box_class()
        vars(box).update(low=np.float32(-1), _np_random=np.random.RandomState(0), _shape=(39,))
        room = 0 if full else 5
        padded = {name: np.concatenate((array, np.zeros_like(array[:room]))) for name, array in arrays.items()}
        vars(buffer).update(
            **padded, pos=0 if full else count, full=full, buffer_size=count + room, observation_space=box,
            device=torch.device("cpu"), timeouts=np.zeros((count + room, 1), np.float32), n_envs=1,
            optimize_memory_usage=False,
        )  # fmt: skip
        path.write_bytes(pickle.dumps(buffer, protocol))


def _one(each: Arrays) -> dict[str, Any]:
    """An episode of a file of its own: no state after the last action, one number for its end."""
    return {"states": each["observations"][:-1], "actions": each["actions"], "rewards": each["rewards"], "dones": True}


def _listed(folder: Path, stem: str, found: list[Arrays]) -> None:
    trajectories = []
    for number, each in enumerate(found):
        one: dict[str, Any] = defaultdict(list)
        for step, action in enumerate(each["actions"]):
            one["observations"].append(each["observations"][step])
            one["next_observations"].append(each["observations"][step + 1])
            one["actions"].append(action)
            one["rewards"].append(each["rewards"][step])
            one["terminals"].append(np.float32(step == len(each["actions"]) - 1))
        one["trj_id"] = number  # type: ignore[assignment]
        trajectories.append(one)
    (folder / f"{stem}.pkl").write_bytes(pickle.dumps(trajectories))


def _of_one_each(suffix: str) -> Callable[[Path, str, list[Arrays]], None]:
    def write(folder: Path, stem: str, found: list[Arrays]) -> None:
        (folder / stem).mkdir()
        for number, each in enumerate(found):
            write_episode(folder / stem / f"{number:06}{suffix}", _one(each))

    return write


def write_episode(path: Path, one: dict[str, Any]) -> None:
    """A file of one episode."""
    if path.suffix == ".npz":
        np.savez_compressed(path, **one)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(one))
    else:
        with h5py.File(path, "w") as file:
            for name, value in one.items():
                file.create_dataset(name, data=value)


def _archived(folder: Path, stem: str, found: list[Arrays]) -> None:
    with tarfile.open(folder / f"{stem}.tar.gz", "w:gz") as archive:
        for number, each in enumerate(found):
            buffer = io.BytesIO()
            np.savez(buffer, **_one(each))
            member = tarfile.TarInfo(f"{stem}/{number:06}.npz")
            member.size = buffer.getbuffer().nbytes
            archive.addfile(member, io.BytesIO(buffer.getvalue()))


#: Format -> writes episodes as ``FOLDER/STEM...``.
FORMATS: dict[str, Callable[[Path, str, list[Arrays]], Any]] = {
    "buffer.pkl": lambda folder, stem, found: replay_buffer(folder / f"{stem}.pkl", stream(found)),
    "buffer-full.pkl": lambda folder, stem, found: replay_buffer(folder / f"{stem}.pkl", stream(found), full=True),
    "buffer-protocol2.pkl": lambda folder, stem, found: replay_buffer(folder / f"{stem}.pkl", stream(found), 2),
    "list.pkl": _listed,
    "stream.npz": lambda folder, stem, found: np.savez_compressed(folder / f"{stem}.npz", **stream(found)),  # type: ignore[arg-type]
    "episodes.npz": _of_one_each(".npz"),
    "episodes.hdf5": _of_one_each(".hdf5"),
    "episodes.pkl": _of_one_each(".pkl"),
    "archive": _archived,
}
