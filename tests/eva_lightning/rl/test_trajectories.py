from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor

from eva_lightning.rl.demonstrations import DemonstrationMeta, load_task, write_task
from eva_lightning.rl.trajectories import TrajectoryDataModule, TrajectoryStore, WindowDataset
from tests.eva_lightning.rl.synthetic import synthetic_task, write_synthetic

TASKS = ("reach-v3", "drawer-open-v3")
K = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("demonstrations"), TASKS)


def data(folder: Path, **changes: Any) -> TrajectoryDataModule:
    return TrajectoryDataModule(folder, TASKS, **{"context": K, "batch_size": 8, "val_episodes": 1, **changes})


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_windows_are_what_the_demonstrations_say(folder: Path) -> None:
    module = data(folder, target="expert")
    dataset = module.train_dataloader().dataset
    assert isinstance(dataset, WindowDataset)
    assert len(dataset) == 2 * 3 * 12
    demonstrations = {task: load_task(folder, task) for task in TASKS}
    seen = set()
    for batch in (dataset[0, first, 8] for first in range(0, 400, 8)):
        shapes = {name: (tuple(value.shape), value.dtype) for name, value in batch.items()}
        assert shapes == {
            "states": ((8, K, 39), torch.float32),
            "actions": ((8, K, 4), torch.float32),
            "target_actions": ((8, K, 4), torch.float32),
            "rewards": ((8, K), torch.float32),
            "returns_to_go": ((8, K), torch.float32),
            "timesteps": ((8, K), torch.int64),
            "mask": ((8, K), torch.bool),
        }
        for row in range(8):
            window = {name: value[row].numpy() for name, value in batch.items()}
            n, first = int(window["mask"].sum()), int(window["timesteps"][0])
            # left-aligned: real steps, then zeros; shorter only at the start of an episode
            assert window["mask"].tolist() == [True] * n + [False] * (K - n)
            assert n == K or first == 0
            assert all(not window[name][n:].any() for name in window)
            matches = [
                (task, episode)
                for task, found in demonstrations.items()
                for episode in range(4)
                if np.array_equal(window["states"][:n], found.observations[episode, first : first + n])
            ]
            assert len(matches) == 1
            task, episode = matches[0]
            assert episode < 3  # the last one is held out
            found, steps = demonstrations[task], slice(first, first + n)
            np.testing.assert_array_equal(window["actions"][:n], found.actions[episode, steps])
            np.testing.assert_array_equal(window["target_actions"][:n], found.expert_actions[episode, steps])
            np.testing.assert_array_equal(window["rewards"][:n], found.rewards[episode, steps])
            to_go = [found.rewards[episode, t:].sum(dtype=np.float64) for t in range(first, first + n)]
            np.testing.assert_allclose(window["returns_to_go"][:n], to_go, rtol=1e-6)
            assert window["timesteps"][:n].tolist() == list(range(first, first + n))
            seen.add((task, episode, first + n - 1))
    assert len(seen) == len(dataset)  # every window comes up


def test_validation_shows_every_held_out_step_once(folder: Path) -> None:
    module = data(folder, eval_batch_size=4)
    batches = list(module.val_dataloader())
    assert [len(batch["mask"]) for batch in batches] == [4, 2]
    together = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert together["task"].tolist() == [0, 0, 0, 1, 1, 1]
    for number, task in enumerate(TASKS):
        rows = together["task"] == number
        states = together["states"][rows][together["mask"][rows]].numpy()
        np.testing.assert_array_equal(states, load_task(folder, task).observations[3, :12])
    assert data(folder, val_episodes=0).val_dataloader() == []


def test_statistics_and_returns_are_of_the_training_episodes(folder: Path) -> None:
    module = data(folder, episodes=2)
    train = {task: load_task(folder, task, 2) for task in TASKS}
    states = np.concatenate([found.observations[:, :12].reshape(-1, 39) for found in train.values()])
    np.testing.assert_allclose(module.statistics["state_mean"], states.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(module.statistics["state_std"], states.std(axis=0), rtol=1e-5)
    for task, found in train.items():
        assert module.max_return[task] == pytest.approx(found.returns.max(), rel=1e-6)
        assert module.mean_return[task] == pytest.approx(found.returns.mean(), rel=1e-6)


def test_dropped_frames_come_back_to_the_bit_and_float16_nearly(folder: Path) -> None:
    full, dropped = data(folder), data(folder, drop_previous_frame=True)
    half = data(folder, drop_previous_frame=True, dtype="float16")
    for key in [(0, 0, 64), (3, 64, 64)]:
        batches = [module.train_dataloader().dataset[key] for module in (full, dropped, half)]
        assert same(batches[0], batches[1])
        for name in batches[0]:
            tolerance = 2e-3 if name in ("states", "actions") else 0
            torch.testing.assert_close(batches[2][name], batches[0][name], rtol=tolerance, atol=tolerance)

    def size(module: TrajectoryDataModule) -> int:
        return (module.store.path / "states.npy").stat().st_size - 128

    # one more row per episode, of 21 values instead of 39
    assert size(dropped) == size(full) * 21 * 13 // (39 * 12)
    assert size(half) == size(dropped) // 2


def test_states_that_do_not_repeat_keep_their_frames(tmp_path: Path) -> None:
    odd = synthetic_task("reach-v3")
    odd.observations[1, 3, 20] += 1
    write_task(tmp_path, odd, DemonstrationMeta(noise=0.1, seed=0))
    with pytest.raises(ValueError, match="reach-v3: states do not repeat the frame before"):
        TrajectoryStore.build(tmp_path, ["reach-v3"], drop_previous_frame=True)
    assert not list((tmp_path / "cache").iterdir())
    TrajectoryStore.build(tmp_path, ["reach-v3"])


def test_windows_are_views_of_the_files(folder: Path) -> None:
    store = TrajectoryStore.build(folder, TASKS)
    views = store.window(episode=5, first=9, steps=K)
    found = load_task(folder, TASKS[1])
    np.testing.assert_array_equal(views["states"], found.observations[1, 9:12])
    np.testing.assert_array_equal(views["target_actions"], found.expert_actions[1, 9:])
    assert all(not view.flags.owndata for view in views.values())
    assert np.shares_memory(views["states"], store.window(5, 10, 1)["states"])
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 5000  # how it travels to loader processes: without the data
    np.testing.assert_array_equal(again.window(5, 9, K)["states"], views["states"])


def test_the_cache_is_used_until_the_demonstrations_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(tmp_path, TASKS)
    first = TrajectoryStore.build(tmp_path, TASKS, tmp_path / "elsewhere")
    with monkeypatch.context() as patched:
        patched.setattr("eva_lightning.rl.trajectory_store.load_task", None)
        assert TrajectoryStore.build(tmp_path, TASKS, tmp_path / "elsewhere").path == first.path
    write_synthetic(tmp_path, TASKS[:1], seed=1)
    second = TrajectoryStore.build(tmp_path, TASKS, tmp_path / "elsewhere")
    assert second.path != first.path
    np.testing.assert_array_equal(second.states(0), load_task(tmp_path, TASKS[0]).observations[0, :12])
    assert json.loads((second.path / "store.json").read_text())["tasks"] == list(TASKS)


def test_an_interrupted_build_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eva_lightning.rl.trajectory_store.load_task", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TrajectoryStore.build(folder, TASKS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_batches_depend_on_seed_and_epoch_alone(folder: Path) -> None:
    def epoch(number: int, **changes: Any) -> list[dict[str, Tensor]]:
        loader = data(folder, **changes).train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        return list(loader)

    first = epoch(0)
    assert len(first) == 72 // 8
    assert all(map(same, first, epoch(0)))
    assert not any(map(same, first, epoch(1)))
    assert not any(map(same, first, epoch(0, seed=1)))
    # a sample is the same in batches of another size
    assert torch.equal(epoch(0, batch_size=12)[1]["states"][4:], first[2]["states"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    epoch(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_loader_processes_change_nothing(folder: Path) -> None:
    alone, several = (list(data(folder, workers=workers).train_dataloader()) for workers in (0, 2))
    assert len(alone) == len(several)
    assert all(map(same, alone, several))


class Recorder(L.LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(39, 1)
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["states"])
        return self.layer(batch["states"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("stop", [4, 9, 13])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_checkpoint_within_an_epoch_resumes_with_the_next_batch(
    folder: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    def fit(steps: int, checkpoint: Path | None = None) -> tuple[L.Trainer, Recorder]:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        module = Recorder()
        trainer.fit(module, data(folder, workers=workers), ckpt_path=checkpoint)
        return trainer, module

    whole = fit(20)[1].seen
    assert len(whole) == 20
    trainer, first = fit(stop)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    rest = fit(20, tmp_path / "x.ckpt")[1].seen
    together = [*first.seen, *rest]
    assert len(together) == 20
    assert all(torch.equal(a, b) for a, b in zip(together, whole, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"context": 0}, ValueError, "context must be a whole number of at least 1, got 0"),
        ({"dtype": "float8"}, ValueError, "unknown dtype 'float8': did you mean float"),
        ({"target": "experts"}, ValueError, "did you mean expert"),
        ({"tasks": ["push-v2"]}, ValueError, "push-v3"),
        ({"tasks": ["push-v3"]}, FileNotFoundError, "collect"),
        ({"tasks": []}, ValueError, "at least one task"),
        ({"episodes": 4}, ValueError, "has 4 episodes of reach-v3, too few for 4 training and 1 held-out episodes"),
        ({"val_episodes": 4}, ValueError, "too few for 1 training and 4 held-out episodes"),
    ],
)
def test_bad_arguments_are_named(folder: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    tasks = changes.pop("tasks", TASKS)
    with pytest.raises(error, match=message):
        TrajectoryDataModule(folder, tasks, **{"context": K, "batch_size": 8, "val_episodes": 1, **changes})


def test_a_damaged_file_is_found_when_the_cache_is_built(tmp_path: Path) -> None:
    write_synthetic(tmp_path, TASKS)
    file = tmp_path / "reach-v3.npz"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        TrajectoryStore.build(tmp_path, TASKS)


@pytest.mark.parametrize("name", ["store.json", "states.npy", "actions.npy", "scalars.npy", "episodes.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_is_said_once_and_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    before = TrajectoryStore.build(folder, TASKS, tmp_path)
    file = before.path / name
    content = file.read_bytes()
    flipped = content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]
    file.unlink()
    if damage != "remove":
        file.write_bytes(flipped if damage == "flip" else content[: len(content) // 2])
    with caplog.at_level("WARNING"):
        after = TrajectoryStore.build(folder, TASKS, tmp_path)
    assert caplog.text.count("the trajectories are prepared again") == 1
    assert after.path == before.path
    for episode in range(len(after)):
        np.testing.assert_array_equal(after.states(episode), before.states(episode))
    np.testing.assert_array_equal(after.returns, before.returns)
    caplog.clear()
    TrajectoryStore.build(folder, TASKS, tmp_path)
    assert not caplog.text
