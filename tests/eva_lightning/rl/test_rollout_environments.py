"""Pinned to loops written by hand over ``gymnasium.make``, in Gymnasium's own MuJoCo environments."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from eva_lightning.rl import rollouts
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy
from eva_lightning.rl.rollout_callback import RolloutCallback
from eva_lightning.rl.rollouts import evaluate
from tests.eva_lightning.rl.minari_files import Reach
from tests.modules import trainer
from tests.rl_helpers import windows

K = 4


def build(states: int, actions: int, bound: float = 1.0, **changes: Any) -> DecisionTransformerModule:
    torch.manual_seed(0)
    module = DecisionTransformerModule(
        state_dim=states, action_dim=actions, width=16, layers=1, heads=2, context=K, action_low=[-bound] * actions,
        action_high=[bound] * actions, return_scale=10.0, reward_scale=1.0, target_return=50.0, **changes,
    )  # fmt: skip
    with torch.no_grad():  # so that actions are far from 0 and differ between states
        module.model.predict_action.weight.mul_(50)
    return module.eval()


def by_hand(module: DecisionTransformerModule, env: gymnasium.Env[Any, Any], seed: int, horizon: int) -> list[float]:
    """Rewards of an episode, each action by the module's forward on the whole window."""
    bound = float(env.action_space.high[0])  # type: ignore[attr-defined]
    states, rewards, over = [env.reset(seed=seed)[0]], [], False
    actions = np.zeros((horizon, *env.action_space.shape))  # type: ignore[misc]
    while not over and len(rewards) < horizon:
        t = len(rewards)
        steps = slice(max(0, t - K + 1), t + 1)
        to_go = 50.0 - np.concatenate(([0.0], np.cumsum(rewards)))
        batch = {
            "states": np.stack(states),
            "actions": actions,
            "rewards": np.append(rewards, 0.0),
            "returns_to_go": to_go,
        }
        window = {name: torch.as_tensor(value[steps]).float()[None] for name, value in batch.items()}
        n = t + 1 - steps.start
        with torch.no_grad():
            action = module({**window, "timesteps": torch.arange(n)[None], "mask": torch.ones(1, n).bool()})[0, -1]
        actions[t] = action.clamp(-bound, bound).numpy()
        state, reward, terminated, truncated, _ = env.step(actions[t].astype(np.float32))
        states.append(state)
        rewards.append(float(reward))
        over = terminated or truncated
    return rewards


# Contacts multiply the rounding of a forward by some ten every five steps of Pusher: few of them tell a fault from it.
@pytest.mark.parametrize(
    ("name", "sizes", "horizon"), [("Hopper-v5", (11, 3, 1.0), 40), ("Pusher-v5", (23, 7, 2.0), 15)]
)
@pytest.mark.parametrize("environments", [1, 3])
def test_equals_a_loop_over_gymnasium_make(name: str, sizes: Any, horizon: int, environments: int) -> None:
    module = build(*sizes)
    options: dict[str, Any] = {"episodes": 3, "seed": 5, "horizon": horizon, "environments": environments}
    result = evaluate(module, partial(gymnasium.make, name), **options)
    with gymnasium.make(name) as env:
        expected = [by_hand(module, env, 5 + episode, horizon) for episode in range(3)]
    assert result.lengths.tolist() == [len(rewards) for rewards in expected]
    np.testing.assert_allclose(result.returns, [sum(rewards) for rewards in expected], rtol=1e-3)
    assert (result.task, result.steps, len(result)) == (name, sum(map(len, expected)), 3)
    assert not result.knows_success
    assert np.isnan(result.success_rate)
    by_id = evaluate(module, name, **options)
    assert by_id.returns.tolist() == result.returns.tolist()
    if name == "Hopper-v5":  # which falls
        assert len(set(result.lengths)) > 1
        assert max(result.lengths) < 40


def test_episodes_that_end_leave_the_policy_and_change_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    class Counting(DecisionTransformerPolicy):
        def keep(self, environments: Any) -> None:
            super().keep(environments)
            kept.append(len(environments))

    monkeypatch.setattr(rollouts, "DecisionTransformerPolicy", Counting)
    module, make = build(11, 3), partial(gymnasium.make, "Hopper-v5")
    for mode in ("exact", "streaming"):
        kept.clear()
        together = evaluate(module, make, episodes=12, environments=6, mode=mode)
        assert kept
        assert max(kept) <= 3
        alone = evaluate(module, make, episodes=12, environments=1, mode=mode)
        assert together.lengths.tolist() == alone.lengths.tolist()
        np.testing.assert_allclose(together.returns, alone.returns, rtol=1e-3)


@pytest.mark.slow
def test_worker_processes_give_the_same() -> None:
    module, make = build(11, 3), partial(gymnasium.make, "Hopper-v5")
    one = evaluate(module, make, episodes=3, environments=1)
    two = evaluate(module, make, episodes=3, environments=1, workers=2)
    np.testing.assert_allclose(one.returns, two.returns, rtol=1e-5)
    assert one.lengths.tolist() == two.lengths.tolist()


@pytest.mark.parametrize("key", ["is_success", "success", None])
def test_goal_environments_and_what_they_say_of_success(key: str | None) -> None:
    result = evaluate(build(4, 2), lambda: Reach(key), episodes=8, horizon=5)
    assert (len(set(result.lengths)) > 1) == result.successes.any() or key is None
    # an episode ends where it is solved, and only there
    solved = result.lengths < 5
    assert solved.any()
    assert result.knows_success == (key is not None)
    if key is not None:
        assert result.successes[solved].all()
        assert result.final_success_rate == result.success_rate == result.successes.mean()
    else:
        assert not result.successes.any()
        assert np.isnan(result.final_success_rate)


def test_the_environments_of_meta_world_by_their_names() -> None:
    module = build(39, 4)
    make = partial(gymnasium.make, "eva_lightning/MetaWorld-reach-v3", split="eval", max_episode_steps=5)
    result = evaluate(module, make, episodes=2, environments=1)
    assert result.knows_success
    for episode, found in enumerate(result.returns):
        with make() as env:
            assert found == pytest.approx(sum(by_hand(module, env, episode, 5)), rel=1e-4)


def test_frames_of_the_first_episodes() -> None:
    class Drawn(Reach):
        render_mode = "rgb_array"

        def render(self) -> Any:
            return np.full((6, 8, 3), int(10 * self.place[0]) % 256)

    result = evaluate(build(4, 2), Drawn, episodes=3, horizon=5, video_episodes=2)
    assert [frames.shape for frames in result.frames] == [(n + 1, 6, 8, 3) for n in result.lengths[:2]]


def test_the_callback_rolls_out_in_any_environment() -> None:
    module = build(39, 4).train()
    names = {"mine": partial(gymnasium.make, "eva_lightning/MetaWorld-reach-v3", max_episode_steps=3)}
    silent = {"other": lambda: gymnasium.wrappers.TransformReward(names["mine"](), lambda reward: 2 * reward)}
    callback = RolloutCallback({**names, **silent}, 2, 2, {"mine": 10.0})
    run = trainer(callback, max_steps=2, max_epochs=-1, val_check_interval=1)
    run.fit(module, DataLoader(windows(), 4), DataLoader(windows(), 4))  # type: ignore[arg-type]
    assert float(run.callback_metrics["rollout/mine/return"]) == pytest.approx(callback.results["mine"].mean_return)
    expected = evaluate(module, names["mine"], episodes=2, target_return=10.0)
    assert callback.results["mine"].returns.tolist() == expected.returns.tolist()
    both = [run.callback_metrics[f"rollout/{name}/return"] for name in ("mine", "other")]
    assert float(run.callback_metrics["rollout/return"]) == pytest.approx(float(sum(both)) / 2)


def test_ids_name_environments_also_of_a_module_that_registers_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = "gymnasium.register('Mine-v0', gymnasium.spec('Hopper-v5').entry_point, max_episode_steps=4)"
    (tmp_path / "robots_of_mine.py").write_text(f"import gymnasium\n{register}\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = {"episodes": 2, "target_return": 10.0}
    mine = evaluate(build(11, 3), "robots_of_mine:Mine-v0", **options)
    assert (
        mine.returns.tolist()
        == evaluate(build(11, 3), partial(hopper, max_episode_steps=4), **options).returns.tolist()
    )
    callback = RolloutCallback(["robots_of_mine:Mine-v0", "Hopper-v5"], 1, 1)
    assert callback.tasks == ("robots_of_mine:Mine-v0", "Hopper-v5")


def hopper(**kwargs: Any) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("Hopper-v5", **kwargs)


SAME = Reach()


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (hopper, {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        (hopper, {"horizon": 0}, "horizon must be a whole number of at least 1, got 0"),
        (hopper, {"video_episodes": 1}, r"frames of Hopper-v5 need render_mode='rgb_array', got None"),
        (lambda: hopper(), {"workers": 2}, "with workers, make_env must be something that goes to other processes"),
        (partial(gymnasium.make, "Pusher-v5"), {}, "of Pusher-v5 have 23 numbers, and the module's have 11"),
        (partial(gymnasium.make, "CartPole-v1"), {}, r"the actions of CartPole-v1 .* got Discrete\(2\)"),
        (partial(gymnasium.make, "FrozenLake-v1"), {}, "the observations of FrozenLake-v1 must be a Box of one axis"),
        ("Hoper-v5", {}, "unknown Meta-World task or Gymnasium environment 'Hoper-v5': did you mean Hopper-v5"),
        ("Hopper", {}, "unknown Meta-World task or Gymnasium environment 'Hopper': did you mean Hopper-v5"),
        ("nowhere:Hopper-v5", {}, "the module of the environment 'nowhere:Hopper-v5' cannot be imported: No module"),
        (lambda: SAME, {}, "make_env must make a new environment at each call"),
        (lambda: None, {}, "make_env must return a gymnasium.Env, got None"),
        (SAME, {}, "make_env must be a function that makes an environment"),
    ],
    ids=lambda value: None if callable(value) else str(value)[:20],
)  # fmt: skip
def test_bad_input_is_one_sentence(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(build(11, 3), make, **{"episodes": 2, **changes})


def test_an_episode_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MAX_STEPS", 7)
    with pytest.raises(ValueError, match="an episode of Pusher-v5 has not ended after 7 steps: give a horizon"):
        evaluate(build(23, 7, 2.0), partial(gymnasium.make, "Pusher-v5", max_episode_steps=-1), episodes=1)
    module = build(23, 7, 2.0, positions="timestep", max_timesteps=5)
    with pytest.raises(ValueError, match="at most the 5 steps of the module's max_timesteps: give a horizon"):
        evaluate(module, partial(gymnasium.make, "Pusher-v5"), episodes=1)
