from __future__ import annotations

import os
from pathlib import Path

import minari
import numpy as np
import pytest

from eva_lightning.rl.collection import collect
from eva_lightning.rl.demonstrations import DemonstrationIndex, load_task
from eva_lightning.rl.minari_export import dataset_name, export_minari


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DemonstrationIndex:
    return collect(["reach"], 3, tmp_path_factory.mktemp("data"), horizon=6, progress=False)


def test_minari_opens_what_was_exported(
    index: DemonstrationIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    for _ in range(2):  # the second replaces the first
        assert export_minari(index, ["reach"], tmp_path, progress=False) == ["metaworld/reach/expert-v0"]
        assert "MINARI_DATASETS_PATH" not in os.environ
    assert [path.name for path in tmp_path.iterdir()] == ["metaworld"]
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert list(minari.list_local_datasets()) == ["metaworld/reach/expert-v0"]
    dataset = minari.load_dataset("metaworld/reach/expert-v0")
    demonstrations = load_task(index.folder, "reach")
    assert (dataset.total_episodes, dataset.total_steps) == (3, 18)
    assert dataset.storage.metadata["algorithm_name"] == "metaworld scripted expert, Gaussian noise 0.1"
    assert "mujoco==" in " ".join(dataset.storage.metadata["requirements"])
    for episode in dataset.iterate_episodes():
        assert np.array_equal(episode.observations, demonstrations.observations[episode.id])
        assert np.array_equal(episode.actions, demonstrations.actions[episode.id])
        assert np.array_equal(episode.rewards, demonstrations.rewards[episode.id])
        assert np.array_equal(episode.infos["success"][1:], demonstrations.successes[episode.id])
        assert np.array_equal(episode.infos["expert_action"][:-1], demonstrations.expert_actions[episode.id])
        assert list(episode.truncations) == [False] * 5 + [True]
        assert not episode.terminations.any()
        assert dataset.spec.observation_space.contains(episode.observations[0])
    options = [episode["options"] for episode in dataset.storage.get_episode_metadata(range(3))]
    assert [int(option["goal"]) for option in options] == [0, 1, 2]


def test_the_environment_of_a_data_set_is_recovered_and_replays_it(
    index: DemonstrationIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_minari(index, ["reach"], tmp_path, progress=False)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    dataset = minari.load_dataset("metaworld/reach/expert-v0")
    (about,) = dataset.storage.get_episode_metadata([2])
    episode = next(dataset.iterate_episodes([2]))
    with dataset.recover_environment() as environment:
        assert environment.spec.id == "eva_lightning/MetaWorld-reach-v3"
        assert (environment.observation_space, environment.action_space) == (
            dataset.observation_space,
            dataset.action_space,
        )
        observations, rewards = [environment.reset(options=about["options"])[0]], []
        for action in episode.actions:
            observation, reward, _, truncated, _ = environment.step(action)
            observations.append(observation)
            rewards.append(reward)
        assert truncated
    assert np.array_equal(np.array(observations, np.float32), episode.observations)
    assert np.array_equal(np.array(rewards, np.float32), episode.rewards)
    with dataset.recover_environment(eval_env=True) as other:
        assert not np.array_equal(other.reset(options=about["options"])[0], observations[0])


def test_without_a_path_minaris_own_is_used(
    index: DemonstrationIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "mine"))
    export_minari(index, ["reach"], progress=False)
    assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path / "mine")
    assert minari.load_dataset(dataset_name("reach-v3")).total_episodes == 3


def test_what_was_not_collected(index: DemonstrationIndex, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no demonstrations of push-v3"):
        export_minari(index, ["reach", "push"], tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
