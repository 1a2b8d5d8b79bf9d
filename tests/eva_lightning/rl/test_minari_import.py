"""Pinned to Minari's own reader, on data sets of Gymnasium's MuJoCo environments that are written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import lightning as L
import minari
import numpy as np
import pytest
import torch

from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule
from tests.eva_lightning.rl.minari_files import Reach, record

K = 4
STEPS = (9, 3, 12, 5, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pusher/random-v0`` (actions within -2 and 2) and ``reach/random-v0`` (goals)."""
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patched, gymnasium.make("Pusher-v5") as pusher, Reach() as reach:
        patched.setenv("MINARI_DATASETS_PATH", str(path))
        record("pusher/random-v0", pusher, STEPS)
        record("reach/random-v0", reach, (6, 6))
    return path


@pytest.fixture(autouse=True)
def _minari_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))


def test_windows_are_what_minari_reads() -> None:
    episodes = list(minari.load_dataset("pusher/random-v0"))
    data = TrajectoryDataModule.from_minari("pusher/random-v0", context=K, batch_size=8, val_episodes=2)
    windows: Any = data.train_dataloader().dataset
    assert data.tasks == ("pusher/random-v0",)
    assert len(windows) == sum(STEPS[:3])
    seen = set()
    for batch in (windows[0, first, 8] for first in range(0, 400, 8)):
        for row in range(8):
            window = {name: value[row].numpy() for name, value in batch.items()}
            n, first = int(window["mask"].sum()), int(window["timesteps"][0])
            found = [e for e in episodes if np.array_equal(e.actions[first : first + n], window["actions"][:n])]
            assert len(found) == 1
            episode = found[0]
            assert episode.id < 3
            states = episode.observations[first : first + n].astype(np.float32)
            np.testing.assert_array_equal(window["states"][:n], states)
            np.testing.assert_allclose(window["rewards"][:n], episode.rewards[first : first + n], rtol=1e-6)
            to_go = [episode.rewards[t:].sum() for t in range(first, first + n)]
            np.testing.assert_allclose(window["returns_to_go"][:n], to_go, rtol=1e-6)
            assert n == K or first == 0
            seen.add((episode.id, first + n))
    assert len(seen) == len(windows)
    held_out = torch.cat([batch["states"][batch["mask"]] for batch in data.val_dataloader()]).numpy()
    expected = [episodes[number].observations[:-1] for number in (3, 4)]
    np.testing.assert_array_equal(held_out, np.concatenate(expected).astype(np.float32))


def test_sizes_bounds_and_scales_are_of_the_spaces_and_the_training_episodes() -> None:
    dataset = minari.load_dataset("pusher/random-v0")
    data = TrajectoryDataModule.from_minari(dataset, val_episodes=2)
    options = data.module_options
    states = np.concatenate([dataset[number].observations[:-1] for number in range(3)])
    np.testing.assert_allclose(options.pop("state_mean"), states.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(options.pop("state_std"), states.std(axis=0), atol=1e-6)
    returns = [episode.rewards.sum() for episode in dataset]
    assert options == {
        "state_dim": dataset.observation_space.shape[0], "action_dim": 7,
        "action_low": [-2.0] * 7, "action_high": [2.0] * 7,
        "return_scale": pytest.approx(max(map(abs, returns))),
        "reward_scale": pytest.approx(max(np.abs(episode.rewards).max() for episode in dataset)),
        "max_timesteps": 12, "target_return": pytest.approx(max(returns[:3])),
    }  # fmt: skip
    assert data.max_return == {"pusher/random-v0": options["target_return"]}


def test_a_goal_is_part_of_the_state_and_the_data_bound_what_the_space_does_not() -> None:
    dataset = minari.load_dataset("reach/random-v0")
    data = TrajectoryDataModule.from_minari(dataset, context=K)
    first = dataset[0]
    expected = np.concatenate((first.observations["observation"], first.observations["desired_goal"]), axis=1)[:-1]
    np.testing.assert_array_equal(data.store.states(0), expected.astype(np.float32))
    actions = np.concatenate([episode.actions for episode in dataset])
    assert data.module_options["action_low"] == [pytest.approx(actions[:, 0].min()), -0.5]
    assert data.module_options["action_high"] == [pytest.approx(actions[:, 0].max()), 1.5]


def test_a_part_of_a_data_set_is_taken_as_minari_gives_it() -> None:
    part = minari.load_dataset("pusher/random-v0").filter_episodes(lambda episode: len(episode.rewards) > 5)
    data = TrajectoryDataModule.from_minari(part)
    assert data.store.lengths.tolist() == [9, 12, 7]
    assert data.store.returns.tolist() == pytest.approx([episode.rewards.sum() for episode in part], rel=1e-6)


def test_a_module_of_its_options_trains_scales_actions_and_keeps_all_in_its_checkpoint(tmp_path: Path) -> None:
    data = TrajectoryDataModule.from_minari("pusher/random-v0", context=K, batch_size=8)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "context": K, "dropout": 0.0}
    module = DecisionTransformerModule(**data.module_options, **sizes, lr=1e-3)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert "val_loss/pusher/random-v0" in trainer.callback_metrics
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        predicted, loss = module.eval()(batch), module.loss(batch)
        # a network of its own for actions in half the units
        plain = DecisionTransformerModule(**{**data.module_options, "action_low": None, "action_high": None}, **sizes)
        plain.load_state_dict(module.state_dict())
        halved = plain.eval()({**batch, "actions": batch["actions"] / 2})
        by_hand = ((predicted - batch["actions"]) / 2)[batch["mask"]].square().mean()
    torch.testing.assert_close(predicted, halved * 2)
    torch.testing.assert_close(loss, by_hand)
    again = DecisionTransformerModule.from_pretrained(save_weights(module, tmp_path / "x.ckpt"))
    assert again.hparams == module.hparams
    with pytest.raises(ValueError, match=r"of other actions: its action_low is .*, got \[-1"):
        DecisionTransformerModule.from_pretrained(tmp_path / "x.ckpt", action_low=[-1.0] * 7)


def test_what_is_no_data_set_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no Minari data set 'pusher/expert-v3' in .*: download it"):
        TrajectoryDataModule.from_minari("pusher/expert-v3")
    (tmp_path / "broken-v0" / "data").mkdir(parents=True)
    (tmp_path / "broken-v0" / "data" / "metadata.json").write_text("{")
    with monkeypatch.context() as patched:
        patched.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        with pytest.raises(ValueError, match="the Minari data set 'broken-v0' cannot be opened"):
            TrajectoryDataModule.from_minari("broken-v0")
    with pytest.raises(TypeError, match="by its id or as a MinariDataset, got 3"):
        TrajectoryDataModule.from_minari(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no expert's: use target executed"):
        TrajectoryDataModule.from_minari("pusher/random-v0", target="expert")
    with pytest.raises(ValueError, match="there are 5 episodes of pusher/random-v0, too few for 5 training"):
        TrajectoryDataModule.from_minari("pusher/random-v0", episodes=5)


def test_what_is_no_vector_or_no_number_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with gymnasium.make("CartPole-v1") as env, pytest.raises(ValueError, match=r"continuous actions\), got Discrete"):
        TrajectoryDataModule.from_minari(record("cartpole/random-v0", env, (3,)))
    with gymnasium.make("FrozenLake-v1") as env, pytest.raises(ValueError, match="must be a Box of one axis"):
        TrajectoryDataModule.from_minari(record("lake/random-v0", env, (3,)))
    with gymnasium.make("Pendulum-v1") as env:
        dataset = record("pendulum/random-v0", env, (3, 3))
        import h5py

        with h5py.File(dataset.storage.data_path / "main_data.hdf5", "a") as file:
            file["episode_1/rewards"][1] = np.nan
        with pytest.raises(ValueError, match="episode 1 of pendulum/random-v0 has numbers that are not finite"):
            TrajectoryDataModule.from_minari(dataset)
        with h5py.File(dataset.storage.data_path / "main_data.hdf5", "a") as file:
            del file["episode_1/actions"]
        with pytest.raises(ValueError, match=r"Minari data set .* is damaged"):
            TrajectoryDataModule.from_minari(dataset)
