"""Published trajectories: every format gives what was written, and what is damaged gives one sentence."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_lightning.errors import InputError
from eva_lightning.rl.published import files_of, read_published
from tests.eva_lightning.rl.published_files import (
    FORMATS,
    HORIZON,
    Arrays,
    episodes,
    replay_buffer,
    stream,
    write_episode,
)

TASK = "push-v3"


def read(folder: Path, **options: Any) -> Any:
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))
    return read_published(TASK, [folder / name for name in files_of(TASK, names)], **{"horizon": HORIZON, **options})


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_episodes_that_were_written(form: str, tmp_path: Path) -> None:
    found = episodes()
    FORMATS[form](tmp_path, "push-v2", found)
    demonstrations, left_out = read(tmp_path)
    assert (demonstrations.task, len(demonstrations), demonstrations.horizon, left_out) == (TASK, 3, HORIZON, 0)
    whole = form.startswith(("buffer", "list", "stream"))
    for number, each in enumerate(found):
        states = each["observations"].copy()
        if not whole:  # the observation after the last action is not in such files
            states[-1] = states[-2]
        np.testing.assert_array_equal(demonstrations.observations[number], states)
        for name in ("actions", "rewards"):
            np.testing.assert_array_equal(getattr(demonstrations, name)[number], each[name])
        assert demonstrations.returns[number] == pytest.approx(each["rewards"].sum(dtype=np.float64))
    assert not demonstrations.knows_success
    assert set(demonstrations.goals) == {-1}
    assert len(read(tmp_path, episodes=2)[0]) == 2


def test_success_is_taken_where_the_files_have_it(tmp_path: Path) -> None:
    arrays = stream(episodes(2))
    arrays["successes"] = np.zeros_like(arrays["rewards"])
    arrays["successes"][[2, 2 * HORIZON - 1]] = 1
    np.savez(tmp_path / "push-v2.npz", **arrays)  # type: ignore[arg-type]
    demonstrations, _ = read(tmp_path)
    assert (demonstrations.success_rate, demonstrations.final_success_rate) == (1.0, 0.5)


def test_steps_of_an_unfinished_episode_are_left_out(tmp_path: Path) -> None:
    replay_buffer(tmp_path / "push-v2.pkl", stream(episodes(), rest=4))
    demonstrations, left_out = read(tmp_path)
    assert (len(demonstrations), left_out) == (3, 4)


def test_a_task_has_its_own_files_alone() -> None:
    names = ["x/push-v2.pkl", "push-wall-v2.pkl", "push-v2/1.npz", "push-v2/0.npz", "stick-push-v2.npz", "push-v2.md"]
    assert files_of("push-v3", names) == ["x/push-v2.pkl"]
    assert files_of("push-v3", names[1:]) == ["push-v2/0.npz", "push-v2/1.npz"]
    assert files_of("push-wall-v3", names) == ["push-wall-v2.pkl"]
    assert files_of("reach-v3", names) == []


class _Runs:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    hostile = pickle.dumps({**stream(episodes()), "more": _Runs(tmp_path / "mark")})
    (tmp_path / "push-v2.pkl").write_bytes(hostile)
    assert len(read(tmp_path)[0]) == 3
    assert not (tmp_path / "mark").exists()
    pickle.loads(hostile)
    assert (tmp_path / "mark").exists()


def _drop(arrays: Arrays, name: str) -> Arrays:
    return {key: array for key, array in arrays.items() if key != name}


def _with(arrays: Arrays, name: str, where: int, value: float) -> Arrays:
    changed = arrays[name].copy()
    changed[where] = value
    return {**arrays, name: changed}


DAMAGES: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "short": (lambda a: _with(a, "dones", 2, 1), "episode 0 has 3 steps, and 6 are expected"),
    "long": (lambda a: _with(a, "dones", HORIZON - 1, 0), "episode 0 has 12 steps, and 6 are expected"),
    "no-end": (lambda a: {**a, "dones": 0 * a["dones"]}, "has no finished episode of push-v3"),
    "metaworld1": (
        lambda a: {**a, "observations": a["observations"][..., :12]},
        r"observations must have shape \(steps, 39\), got \(18, 12\)",
    ),
    "two-environments": (
        lambda a: {**a, "actions": np.repeat(a["actions"], 2, axis=1)},
        r"actions must have shape \(steps, 4\), got \(18, 2, 4\)",
    ),
    "unequal": (lambda a: {**a, "rewards": a["rewards"][:-1]}, "it has 18 states and 17 rewards"),
    "no-actions": (lambda a: _drop(a, "actions"), "it has no array actions"),
    "no-dones": (lambda a: _drop(a, "dones"), "it has no array dones or terminals"),
    "nan": (lambda a: _with(a, "observations", 7, np.nan), "the states of episode 1 are not finite"),
    "infinite": (lambda a: _with(a, "rewards", 13, np.inf), "the rewards of episode 2 are not finite"),
    "loud": (lambda a: _with(a, "actions", 3, 1.5), r"actions must lie in \[-1, 1\], and there is one of 1\.5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_files_that_are_not_as_expected_are_named_in_one_sentence(damage: str, kind: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    arrays = change(stream(episodes()))
    if kind == "npz":
        np.savez(tmp_path / "push-v2.npz", **arrays)  # type: ignore[arg-type]
    else:
        (tmp_path / "push-v2.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path)
    assert f"push-v2.{kind}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["buffer.pkl", "list.pkl", "stream.npz", "episodes.npz", "episodes.hdf5", "archive"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_files_that_are_cut_off_are_named_in_one_sentence(form: str, share: float, tmp_path: Path) -> None:
    FORMATS[form](tmp_path, "push-v2", episodes())
    file = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.name)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_array_is_no_larger_than_its_bytes(tmp_path: Path) -> None:
    import copyreg

    def huge(array: np.ndarray) -> Any:
        build, arguments, state = array.__reduce__()  # type: ignore[misc]
        return build, arguments, (state[0], (10**13, 39), *state[2:])

    class Pickler(pickle.Pickler):
        dispatch_table = copyreg.dispatch_table | {np.ndarray: huge}

    with (tmp_path / "push-v2.pkl").open("wb") as file:
        Pickler(file, 4).dump({"observations": np.zeros((2, 39), np.float32)})
    with pytest.raises(InputError, match=r"an array of shape \(10000000000000, 39\) has 312 bytes"):
        read(tmp_path)


def test_an_hdf5_file_is_not_unpacked_beyond_reason(tmp_path: Path) -> None:
    import h5py

    (tmp_path / "push-v2").mkdir()
    with h5py.File(tmp_path / "push-v2" / "0.hdf5", "w") as file:
        file.create_dataset("states", shape=(10**10, 39), dtype="f4", chunks=(1000, 39))
    with pytest.raises(InputError, match=r"0\.hdf5 is damaged \(it would unpack to"):
        read(tmp_path)


def test_episodes_in_files_of_their_own_must_have_one_length(tmp_path: Path) -> None:
    FORMATS["episodes.npz"](tmp_path, "push-v2", episodes(2))
    (short,) = episodes(1, horizon=4)
    one = {"states": short["observations"][:-1], "actions": short["actions"], "rewards": short["rewards"]}
    write_episode(tmp_path / "push-v2" / "000002.npz", one)
    with pytest.raises(InputError, match=r"000002\.npz: episode 0 has 4 steps, and 6 are expected"):
        read(tmp_path)
    (tmp_path / "push-v2" / "000002.npz").unlink()
    with pytest.raises(InputError, match="has 2 episodes of push-v3, and 9 were asked for"):
        read(tmp_path, episodes=9)
