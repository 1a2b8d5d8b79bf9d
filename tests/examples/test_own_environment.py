"""The example of a robot of one's own, pinned to Minari's reader and to MuJoCo."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import gymnasium
import minari
import numpy as np
import pytest

from tests.paths import ROOT


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("own_environment", ROOT / "examples" / "own_environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_small_and_its_data_set_is_what_halfcheetah_did(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "HORIZON", 12)
    before, after = example.main(training_steps=2, fine_tuning_steps=2, episodes=2)
    assert before.shape == after.shape == (2,)
    assert [line.partition(",")[0].partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "slow gait", "expert", "expert without noise", "before fine-tuning", "EVA fine-tuning", "EVA fine-tuning",
    ]  # fmt: skip
    dataset = minari.load_dataset("halfcheetah/gait-v0")
    episode = dataset[3]
    with gymnasium.make("HalfCheetah-v5") as env:
        observation, _ = env.reset(seed=3)
        for step, action in enumerate(episode.actions):
            assert np.array_equal(observation, episode.observations[step])
            observation, reward, *_ = env.step(action)
            assert reward == episode.rewards[step]


def test_the_expert_runs(example: ModuleType) -> None:
    with gymnasium.make("HalfCheetah-v5", max_episode_steps=200) as env:
        expert, slow = (example.play(env, example.GAIT, seed=1, pace=pace)[2].sum() for pace in (1.0, 0.5))
    assert expert > 1.5 * slow
    assert expert > 250


@pytest.mark.slow
def test_as_it_is_fine_tuning_makes_it_run_faster(example: ModuleType) -> None:
    before, after = example.main()
    assert after.mean() > 1.5 * before.mean()
