from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_lightning.rl import partial_store
from eva_lightning.rl.collection import ChunkQueue, ExpertRunner, collect
from eva_lightning.rl.demonstrations import DemonstrationIndex, load_task, read_index
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.partial_store import Chunk, Conditions, PartialStore
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_store, "CHUNK", 2)


def quick(
    folder: Path, episodes: int = 5, tasks: tuple[str, ...] = ("reach-v3",), **options: Any
) -> DemonstrationIndex:
    return collect(tasks, episodes, folder, **{"horizon": 8, "progress": False, **options})


def checksums(index: DemonstrationIndex) -> dict[str, str]:
    return {task: index[task].sha256 for task in index}


def test_the_experts_solve_their_tasks_and_both_actions_are_kept(tmp_path: Path) -> None:
    index = collect(["push", "faucet-close"], 2, tmp_path, noise=0.2, progress=False)
    for task, entry in index.tasks.items():
        demonstrations = load_task(tmp_path, task)
        assert demonstrations.success_rate == entry.success_rate == 1.0
        assert entry.mean_return > 1200
        assert demonstrations.actions.shape == (2, 200, 4)
        assert abs(demonstrations.actions).max() == abs(demonstrations.expert_actions).max() == 1.0
        added = demonstrations.actions - demonstrations.expert_actions
        inside = abs(demonstrations.actions) < 1
        assert 0.1 < added[inside].std() < 0.25
        assert list(demonstrations.goals) == [0, 1]
        assert set(entry.versions) == {"metaworld", "mujoco", "gymnasium", "numpy"}


def test_a_replay_of_the_stored_actions_gives_the_stored_episode(tmp_path: Path) -> None:
    quick(tmp_path, episodes=3)
    demonstrations = load_task(tmp_path, "reach")
    with MetaWorldEnvironment("reach", horizon=8) as environment:
        observations = [environment.reset(options={"goal": demonstrations.goals[2]})[0]]
        rewards = []
        for action in demonstrations.actions[2]:
            observation, reward, *_ = environment.step(action)
            observations.append(observation)
            rewards.append(reward)
    assert np.array_equal(np.array(observations, dtype=np.float32), demonstrations.observations[2])
    assert np.array_equal(np.array(rewards, dtype=np.float32), demonstrations.rewards[2])


def test_the_same_bits_from_one_process_and_from_two(tmp_path: Path) -> None:
    tasks = ("reach-v3", "push-v3")
    one = quick(tmp_path / "one", tasks=tasks)
    two = quick(tmp_path / "two", tasks=tasks, workers=2)
    assert checksums(one) == checksums(two)
    shared = quick(tmp_path / "shared", tasks=tasks[:1], workers=2)
    assert shared["reach-v3"].sha256 == one["reach-v3"].sha256
    assert not temporaries(tmp_path)
    assert not list(tmp_path.rglob(".partial"))


def test_more_episodes_extend_and_fewer_change_nothing(tmp_path: Path) -> None:
    quick(tmp_path / "grown", episodes=3)
    grown = quick(tmp_path / "grown", episodes=5)
    assert checksums(grown) == checksums(quick(tmp_path / "at once", episodes=5))
    assert checksums(quick(tmp_path / "grown", episodes=2)) == checksums(grown)
    assert len(list((tmp_path / "grown").glob("*.npz"))) == 1
    other = quick(tmp_path / "other", episodes=5, seed=1)
    assert checksums(other) != checksums(grown)


def test_an_interruption_costs_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = ExpertRunner.run, []

    def interrupted(self: ExpertRunner, chunk: Chunk) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(chunk)
        return run(self, chunk)

    monkeypatch.setattr(ExpertRunner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "stopped")
    assert done == [Chunk("reach-v3", 0, 2), Chunk("reach-v3", 2, 4)]
    monkeypatch.setattr(ExpertRunner, "run", lambda self, chunk: done.append(chunk) or run(self, chunk))
    resumed = quick(tmp_path / "stopped")
    assert done[2:] == [Chunk("reach-v3", 4, 5)]
    monkeypatch.undo()
    assert checksums(resumed) == checksums(quick(tmp_path / "whole"))


def test_killed_between_file_and_index_or_before_tidying_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quick(tmp_path / "whole")
    write = partial_store.write_task

    def killed_before(*args: Any) -> Any:
        raise KeyboardInterrupt

    def killed_after(*args: Any) -> Any:
        write(*args)
        raise KeyboardInterrupt

    for name, killed in (("before", killed_before), ("after", killed_after)):
        monkeypatch.setattr(partial_store, "write_task", killed)
        with pytest.raises(KeyboardInterrupt):
            quick(tmp_path / name)
        monkeypatch.setattr(partial_store, "write_task", write)
        assert list((tmp_path / name).rglob(".partial"))
        assert checksums(quick(tmp_path / name)) == checksums(whole)
        assert not list((tmp_path / name).rglob(".partial"))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_half_way_nothing_is_corrupt_and_nothing_keeps_running(tmp_path: Path, workers: int) -> None:
    tasks = ("reach-v3", "push-v3")
    arguments = ["--tasks", "reach,push", "--episodes", "60", "--horizon", "8", "--workers", str(workers)]
    command = [sys.executable, "-m", "experiments.metaworld", "collect", *arguments, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _wait_for(lambda: list((tmp_path / "killed").rglob("*.npz")) or process.poll() is not None)
        children = _children(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read().decode() if process.stderr else ""
    assert len(children) >= (workers if workers > 1 else 0)
    _wait_for(lambda: not any(_alive(child) for child in children))
    before = {path: path.read_bytes() for path in (tmp_path / "killed").rglob("*.npz")}
    assert before
    resumed = quick(tmp_path / "killed", episodes=14, tasks=tasks)
    whole = quick(tmp_path / "whole", episodes=14, tasks=tasks)
    for task in tasks:
        found, expected = load_task(tmp_path / "killed", task), load_task(tmp_path / "whole", task)
        assert resumed[task].episodes >= whole[task].episodes == 14
        assert np.array_equal(found.observations[:14], expected.observations)
        assert np.array_equal(found.actions[:14], expected.actions)
    assert not temporaries(tmp_path)


def temporaries(folder: Path) -> list[Path]:
    return [*folder.rglob(".*.npz"), *folder.rglob(".index.json-*")]


def _wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in file.read_text().split()] if file.exists() else []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_end_of_a_process_is_said_and_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = PartialStore.add

    def add_and_end(self: Any, chunk: Chunk, demonstrations: Any) -> None:
        add(self, chunk, demonstrations)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    monkeypatch.setattr(PartialStore, "add", add_and_end)
    with pytest.raises(RuntimeError, match="a process ended unexpectedly while collecting reach-v3"):
        quick(tmp_path, episodes=8, workers=2)
    assert not multiprocessing.active_children()
    assert len(list(tmp_path.rglob("reach-v3.*.npz"))) >= 1


@pytest.mark.parametrize(("name", "value"), [("noise", 0.3), ("seed", 5), ("horizon", 9)])
def test_another_kind_of_demonstrations_is_refused(tmp_path: Path, name: str, value: float) -> None:
    quick(tmp_path, episodes=1)
    before = checksums(read_index(tmp_path))
    with pytest.raises(
        ValueError, match=rf"holds demonstrations of reach-v3 with {name} .*, not {value}: choose another"
    ):
        quick(tmp_path, episodes=1, tasks=("push-v3",), **{name: value})
    assert checksums(read_index(tmp_path)) == before


def test_unfinished_episodes_of_another_kind_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialStore, "finish", lambda self, task: None)
    with pytest.raises(FileNotFoundError):
        quick(tmp_path / "mixed", noise=0.3)
    monkeypatch.undo()
    assert checksums(quick(tmp_path / "mixed")) == checksums(quick(tmp_path / "clean"))


@pytest.mark.parametrize("damage", ["changed", "missing", "partial"])
def test_what_is_damaged_is_collected_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    whole = checksums(quick(tmp_path, episodes=3))
    file = tmp_path / "reach-v3.npz"
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-9] + b"something")
    else:
        file.unlink()
    if damage == "partial":
        partial = tmp_path / ".partial" / "noise0.1-seed0-horizon8"
        partial.mkdir(parents=True)
        (partial / "reach-v3.0-2.npz").write_bytes(b"PK")
    assert checksums(quick(tmp_path, episodes=1)) == whole
    assert "reach-v3 is collected again" in caplog.text
    load_task(tmp_path, "reach")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is collecting into"):
            quick(tmp_path)
    quick(tmp_path, episodes=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes must be a whole number of at least 1, got 0"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"horizon": 501}, "horizon must be a whole number of at least 1 and of at most 500, got 501"),
        ({"noise": -0.1}, "noise must be a number of at least 0, got -0.1"),
        ({"noise": float("nan")}, "noise must be a number of at least 0, got nan"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"tasks": ("push-v2",)}, "did you mean push-v3"),
    ],
)
def test_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_work_is_shared_by_task_first() -> None:
    pending = {task: [Chunk(task, i, i + 1) for i in range(3)] for task in ("a", "b")}
    queue = ChunkQueue(pending)
    assert len(queue) == 6
    assert queue.next(None) == Chunk("a", 0, 1)
    assert queue.next(None) == Chunk("b", 0, 1)
    assert queue.next("b") == Chunk("b", 1, 2)
    assert queue.next(None) == Chunk("a", 1, 2)
    assert queue.next("b") == Chunk("b", 2, 3)
    assert queue.next("b") == Chunk("a", 2, 3)
    assert queue.next("a") is None


def test_the_runner_keeps_one_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExpertRunner(Conditions(0.0, 0, 5)) as runner:
        first = runner.run(Chunk("reach-v3", 0, 1))
        environment = runner._environment
        assert np.array_equal(first.actions, first.expert_actions)
        runner.run(Chunk("reach-v3", 1, 2))
        assert runner._environment is environment
        runner.run(Chunk("push-v3", 0, 1))
        assert runner._environment is not environment
    assert runner._environment is None
