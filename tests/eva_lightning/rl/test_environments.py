from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.tasks import ACTION_DIM, MAX_HORIZON, STATE_DIM, TASKS


def first_observation(environment: MetaWorldEnvironment, goal: int) -> npt.NDArray[np.float64]:
    observation, info = environment.reset(options={"goal": goal})
    assert info == {"goal": goal % 50}
    return observation


def _roll(environment: MetaWorldEnvironment, goal: int, seed: int, steps: int) -> npt.NDArray[np.float64]:
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, ACTION_DIM))
    rows = [np.append(first_observation(environment, goal), [0.0, 0.0])]
    for action in actions:
        observation, reward, _, _, info = environment.step(action)
        rows.append(np.append(observation, [reward, info["success"]]))
    return np.array(rows)


def _random_vectors(tasks: Any) -> npt.NDArray[np.float64]:
    return np.array([pickle.loads(task.data)["rand_vec"] for task in tasks])


def test_observations_and_the_end_of_an_episode() -> None:
    with MetaWorldEnvironment("faucet-close", horizon=3) as environment:
        assert (environment.task, environment.n_goals, environment.horizon) == ("faucet-close-v3", 50, 3)
        first = first_observation(environment, 0)
        assert first.shape == (STATE_DIM,)
        assert first.dtype == np.float64
        assert np.array_equal(first[:18], first[18:36])
        assert first[36:].any(), "the goal must be visible"
        ends = []
        before = first
        for _ in range(3):
            observation, reward, terminated, truncated, info = environment.step(np.full(ACTION_DIM, 0.5))
            assert np.array_equal(observation[18:36], before[:18])
            assert isinstance(reward, float)
            assert 0 <= reward <= 10
            assert info["success"] is terminated is False
            ends.append(truncated)
            before = observation
        assert ends == [False, False, True]
        with pytest.raises(ValueError, match="episode of faucet-close-v3 is over after 3 steps: call reset"):
            environment.step(np.zeros(ACTION_DIM))
        environment.reset(options={"goal": 1})
        with pytest.raises(ValueError, match=r"an action has shape \(4,\), got \(3,\)"):
            environment.step(np.zeros(3))


def test_earlier_episodes_leave_no_trace() -> None:
    with MetaWorldEnvironment("push") as used, MetaWorldEnvironment("push") as fresh:
        _roll(used, 7, seed=1, steps=60)
        again = _roll(used, 53, seed=0, steps=40)
        assert np.array_equal(again, _roll(fresh, 3, seed=0, steps=40))
        assert not np.array_equal(again[0], first_observation(fresh, 4))


def test_actions_are_clipped() -> None:
    with MetaWorldEnvironment("push") as environment:
        environment.reset(options={"goal": 0})
        beyond = environment.step(np.array([3.0, -2.0, 0.5, 1.5]))
        environment.reset(options={"goal": 0})
        at_the_border = environment.step(np.array([1.0, -1.0, 0.5, 1.0], dtype=np.float32))
    assert np.array_equal(beyond[0], at_the_border[0])
    assert beyond[1] == at_the_border[1]


def test_evaluation_goals_are_disjoint_from_training_goals_of_any_seed() -> None:
    firsts: dict[str, set[bytes]] = {"train": set(), "eval": set()}
    for seed in (0, 1, 2):
        for split in ("train", "eval"):
            with MetaWorldEnvironment("window-close", seed=seed, split=split) as environment:
                firsts[split] |= {vector.tobytes() for vector in _random_vectors(environment._goals)}
    assert len(firsts["train"]) == len(firsts["eval"]) == 3 * 50
    assert not firsts["train"] & firsts["eval"]


# lever-pull reads orientations that only the simulator fills in; window-close places its arm by a method of its own
@pytest.mark.parametrize("task", ["lever-pull-v3", "window-close-v3"])
def test_goals_are_those_of_mt1(task: str) -> None:
    _compare_with_mt1(task)


@pytest.mark.slow
def test_goals_are_those_of_mt1_for_more_tasks() -> None:
    for task in TASKS[::6]:
        _compare_with_mt1(task)


def _compare_with_mt1(task: str) -> None:
    import metaworld

    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    with MetaWorldEnvironment(task, seed=3, split="eval") as environment:
        assert [goal.data for goal in environment._goals] == [goal.data for goal in metaworld.MT1(task, 7).train_tasks]
    after = np.random.get_state()[1]  # noqa: NPY002
    assert np.array_equal(before, after), "the global generator is not ours to turn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "push-v2"}, "did you mean push-v3"),
        ({"horizon": MAX_HORIZON + 1}, "horizon must be a whole number of at least 1 and of at most 500, got 501"),
        ({"horizon": 0}, "horizon must be a whole number of at least 1 and of at most 500, got 0"),
        ({"split": "test"}, "unknown split 'test': choose from train, eval"),
        ({"seed": -1}, "seed must be a whole number of at least 0 and below"),
        ({"render_size": 0}, "render_size must be a whole number of at least 1, got 0"),
        ({"render_mode": "human"}, "unknown render mode 'human': choose from rgb_array"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetaWorldEnvironment(**{"task": "push-v3", **arguments})


def test_frames_must_be_asked_for_and_closing_twice_is_fine() -> None:
    environment = MetaWorldEnvironment("push")
    environment.reset(options={"goal": 0})
    with pytest.raises(ValueError, match="frames need a render_mode"):
        environment.render()
    environment.close()
    environment.close()
    with pytest.raises(ValueError, match="call reset"):
        environment.step(np.zeros(ACTION_DIM))
