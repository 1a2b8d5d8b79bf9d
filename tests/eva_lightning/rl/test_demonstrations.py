from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_lightning.errors import InputError
from eva_lightning.rl import demonstrations as module
from eva_lightning.rl.demonstrations import (
    DemonstrationMeta,
    TaskDemonstrations,
    decode,
    encode,
    join,
    load_task,
    read_index,
    write_task,
)
from eva_lightning.sealed import read_sealed_json, write_sealed_json
from tests.eva_lightning.rl.synthetic import write_synthetic

META = DemonstrationMeta(noise=0.1, seed=3, versions={"mujoco": "3.3.0"})
NAMES = ("observations", "actions", "expert_actions", "rewards", "successes", "goals")


def make(task: str = "push-v3", episodes: int = 4, horizon: int = 6, seed: int = 0) -> TaskDemonstrations:
    rng = np.random.default_rng(seed)
    successes = np.zeros((episodes, horizon), dtype=np.bool_)
    successes[0, 2] = True
    return TaskDemonstrations(
        task,
        observations=rng.standard_normal((episodes, horizon + 1, 39)).astype(np.float32),
        actions=rng.uniform(-1, 1, (episodes, horizon, 4)).astype(np.float32),
        expert_actions=rng.uniform(-1, 1, (episodes, horizon, 4)).astype(np.float32),
        rewards=rng.uniform(0, 10, (episodes, horizon)).astype(np.float32),
        successes=successes,
        goals=np.arange(episodes),
    )


def equal(one: TaskDemonstrations, other: TaskDemonstrations) -> bool:
    return one.task == other.task and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in NAMES)


def test_round_trip_and_index(tmp_path: Path) -> None:
    push, reach = make(), make("reach-v3", seed=1)
    write_task(tmp_path, reach, META)
    write_task(tmp_path, push, META)
    index = read_index(tmp_path)
    assert list(index) == ["push-v3", "reach-v3"]
    entry = index["push-v3"]
    assert (entry.file, entry.episodes, entry.horizon, entry.noise, entry.seed) == ("push-v3.npz", 4, 6, 0.1, 3)
    assert entry.versions == {"mujoco": "3.3.0"}
    assert entry.success_rate == push.success_rate == 0.25
    assert entry.mean_return == pytest.approx(push.rewards.sum(1).mean(), rel=1e-6)
    assert entry.max_return == push.returns.max()
    assert equal(load_task(tmp_path, "push"), push)
    assert equal(load_task(tmp_path, "reach-v3", episodes=2), reach.episodes(stop=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "push-v3.npz", "reach-v3.npz"]


def test_success_is_counted_at_any_step_and_at_the_last_and_may_be_unknown(tmp_path: Path) -> None:
    demonstrations = make()
    demonstrations.successes[1, -1] = True
    entry = write_task(tmp_path, demonstrations, META)
    assert (entry.success_rate, entry.final_success_rate) == (0.5, 0.25)
    assert read_index(tmp_path)["push-v3"] == entry
    # an index from before the last step was noted
    content = read_sealed_json(tmp_path / "index.json")
    for name in ("final_success_rate", "source"):
        del content["tasks"]["push-v3"][name]
    write_sealed_json(tmp_path / "index.json", content)
    assert (read_index(tmp_path)["push-v3"].success_rate, read_index(tmp_path)["push-v3"].final_success_rate) == (
        0.5,
        None,
    )
    arrays = {name: getattr(demonstrations, name) for name in NAMES}
    unknown = TaskDemonstrations("push-v3", **arrays | {"successes": np.zeros((4, 0), dtype=np.bool_)})
    entry = write_task(tmp_path, unknown, META)
    assert (entry.success_rate, entry.final_success_rate) == (None, None)
    assert np.isnan(load_task(tmp_path, "push-v3", 2).success_rate)


def test_the_same_demonstrations_are_the_same_bytes() -> None:
    assert encode(make()) == encode(make())
    assert equal(join([make().episodes(stop=1), make().episodes(1)]), make())


def test_replacing_leaves_one_file(tmp_path: Path) -> None:
    for seed in range(3):
        write_task(tmp_path, make(seed=seed), META)
        assert equal(load_task(tmp_path, "push"), make(seed=seed))
        assert len(list(tmp_path.glob("*.npz"))) == 1


@pytest.mark.parametrize("moment", range(6))
def test_what_was_there_survives_a_stop_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    write_task(tmp_path, make(), META)
    replace, unlink, steps = Path.replace, Path.unlink, [0]

    def stop_at_moment(step: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if steps[0] == moment:
                raise KeyboardInterrupt
            steps[0] += 1
            return step(*args, **kwargs)

        return run

    monkeypatch.setattr(Path, "replace", stop_at_moment(replace))
    monkeypatch.setattr(Path, "unlink", stop_at_moment(unlink))
    if moment < 5:
        with pytest.raises(KeyboardInterrupt):
            write_task(tmp_path, make(seed=1), META)
    else:
        write_task(tmp_path, make(seed=1), META)
    monkeypatch.undo()
    found = load_task(tmp_path, "push")
    assert equal(found, make()) if moment < 3 else equal(found, make(seed=1))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    write_task(tmp_path, make(), META)
    file = tmp_path / "push-v3.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"flip": bytes(content), "cut": bytes(content[:100]), "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"push-v3\.npz is damaged .*SHA-256.*: make it again with eva-lightning .*"):
        load_task(tmp_path, "push")


def test_bytes_that_are_no_demonstrations(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 something", encode(make())[:200]):
        with pytest.raises(ValueError, match=r"demonstration file of push-v3 is damaged"):
            decode("push-v3", content)


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing.*metaworld collect --tasks mt40"):
        read_index(tmp_path)
    write_task(tmp_path, make(), META)
    with pytest.raises(FileNotFoundError, match=r"no demonstrations of reach-v3 in .* \(it has push-v3\): collect"):
        load_task(tmp_path, "reach")
    with pytest.raises(ValueError, match="did you mean push-v3"):
        load_task(tmp_path, "push-v2")
    for episodes in (0, 5):
        with pytest.raises(ValueError, match=f"has 4 episodes of push-v3, asked for {episodes}"):
            load_task(tmp_path, "push", episodes)
    (tmp_path / "push-v3.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"push-v3\.npz is missing: make it again with .* --episodes 4"):
        load_task(tmp_path, "push")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "tasks": {"push-v3": {}}}', '{"format": 1, "ta'])
def test_a_damaged_index_is_said_to_be_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        read_index(tmp_path)


def test_an_index_of_a_later_format(tmp_path: Path) -> None:
    write_task(tmp_path, make(), META)
    content = read_sealed_json(tmp_path / "index.json")
    write_sealed_json(tmp_path / "index.json", {**content, "format": module._FORMAT + 1})
    with pytest.raises(ValueError, match="has format 2, this version of the project reads format 1"):
        read_index(tmp_path)


def test_wrong_shapes_and_types_are_refused() -> None:
    good = {name: getattr(make(), name) for name in NAMES}
    for name, value in (
        ("observations", good["observations"][:, :-1]),
        ("rewards", good["rewards"].astype(np.float64)),
        ("goals", good["goals"][:2]),
        ("actions", good["actions"][0]),
    ):
        with pytest.raises(ValueError, match=f"push-v3: {name} "):
            TaskDemonstrations("push-v3", **{**good, name: value})
    with pytest.raises(ValueError, match="no episode of push-v3 to write"):
        write_task("unused", make().episodes(stop=0), META)


@pytest.mark.parametrize("file", ["../thesis.tex", "/etc/hostname", "a/b.npz", "..", "a\\b", "", None, "x" * 300])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(tmp_path: Path, file: str | None) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years")
    folder = tmp_path / "data"
    write_task(folder, make(), META)
    index = json.loads((folder / "index.json").read_text())
    index["tasks"]["push-v3"]["file"] = file
    (folder / "index.json").write_text(json.dumps({"format": 1, "tasks": index["tasks"]}))
    with pytest.raises(ValueError):
        read_index(folder)
    with pytest.raises(ValueError):
        write_task(folder, make(), META)
    assert thesis.read_text() == "years"


def test_files_of_others_in_the_folder_are_neither_replaced_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "push-v3.npz").write_text("theirs")
    (tmp_path / "notes.txt").write_text("theirs")
    entry = write_task(tmp_path, make(), META)
    assert load_task(tmp_path, "push-v3").task == "push-v3"
    index = json.loads((tmp_path / "index.json").read_text())
    index["tasks"]["push-v3"]["file"] = "notes.txt"
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "tasks": index["tasks"]}))
    assert write_task(tmp_path, make(), META).file == entry.file
    assert {(tmp_path / name).read_text() for name in ("push-v3.npz", "notes.txt")} == {"theirs"}


@pytest.mark.parametrize(("field", "value"), [("episodes", -3), ("episodes", 2**70), ("horizon", 0)])
def test_an_index_of_impossible_numbers_is_refused(tmp_path: Path, field: str, value: int) -> None:
    write_synthetic(tmp_path, ["push-v3"], 2, 3)
    content = read_sealed_json(tmp_path / "index.json")
    content["tasks"]["push-v3"][field] = value
    write_sealed_json(tmp_path / "index.json", content)
    with pytest.raises(InputError, match=rf"{field} of push-v3 must be a whole number of at least 1"):
        read_index(tmp_path)
