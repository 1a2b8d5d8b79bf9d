from __future__ import annotations

import copy
import pickle
import random
from functools import cache
from typing import Any

import gymnasium
import metaworld
import numpy as np
import pytest
import torch
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from torch.utils.data import DataLoader

from eva_lightning.adapters import has_adapters
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.rl import rollout_environments, rollouts
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy
from eva_lightning.rl.rollouts import RolloutResult, evaluate
from tests.modules import trainer
from tests.rl_helpers import windows

QUICK: dict[str, Any] = {"target_return": 1000.0, "horizon": 12}


def build(**kwargs: Any) -> DecisionTransformerModule:
    torch.manual_seed(0)
    module = DecisionTransformerModule(width=16, layers=1, heads=2, context=4, **kwargs)
    with torch.no_grad():  # so that actions are far from 0 and differ between states
        module.model.predict_action.weight.mul_(50)
    return module


@cache
def goals_of_seed_7() -> list[Any]:
    """The evaluation goals of push, by metaworld itself."""
    return list(metaworld.MT1("push-v3", seed=15).train_tasks)


@pytest.mark.parametrize("environments", [None, 1, 2])
def test_equals_metaworlds_own_environment_and_the_full_window_by_hand(environments: int | None) -> None:
    module = build().eval()
    result = evaluate(module, "push", episodes=3, environments=environments, seed=7, **QUICK)
    env: Any = ALL_V3_ENVIRONMENTS["push-v3"](reward_function_version="v2")
    for episode, goal in enumerate(goals_of_seed_7()[:3]):
        env.set_task(goal)
        states, actions, rewards, solved = [env.reset()[0]], np.zeros((12, 4)), np.zeros(12), []
        for t in range(12):
            steps = slice(max(0, t - 3), t + 1)  # a context of four
            to_go = 1000.0 - np.concatenate(([0.0], rewards.cumsum()))
            batch = {"states": np.stack(states), "actions": actions, "rewards": rewards, "returns_to_go": to_go}
            window = {name: torch.as_tensor(value[steps]).float()[None] for name, value in batch.items()}
            n = t + 1 - steps.start
            with torch.no_grad():
                action = module({**window, "timesteps": torch.arange(n)[None], "mask": torch.ones(1, n).bool()})[0, -1]
            actions[t] = action.clamp(-1, 1).double().numpy()
            state, rewards[t], _, _, info = env.step(actions[t])
            states.append(state)
            solved.append(bool(info["success"]))
        assert result.returns[episode] == pytest.approx(rewards.sum(), rel=1e-4)
        assert (result.successes[episode], result.final_successes[episode]) == (any(solved), solved[-1])
    env.close()


@pytest.mark.parametrize(
    ("episodes", "environments", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [3, 3]), (51, None, [26, 25]), (2, 5, [2])]
)
def test_batches_are_of_one_size(
    episodes: int, environments: int | None, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[int]] = []

    class NoEnvironment(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (39,))
        action_space = gymnasium.spaces.Box(-1, 1, (4,))

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

    def lock_step(policy: Any, envs: Any, interface: Any, numbers: list[int], *rest: Any) -> RolloutResult:
        assert policy.n_environments == len(envs) == len(numbers)
        found.append(numbers)
        return RolloutResult("push-v3", *(np.zeros(len(numbers), bool),) * 2, np.array(numbers, float), 1, 0.0)

    monkeypatch.setattr(rollout_environments, "MetaWorldEnvironment", NoEnvironment)
    monkeypatch.setattr(rollouts, "_lock_step", lock_step)
    result = evaluate(build(), "push", episodes=episodes, environments=environments, **QUICK)
    assert [len(numbers) for numbers in found] == sizes
    assert result.returns.tolist() == list(range(episodes))


@pytest.mark.parametrize("diverged", [False, True])
def test_adapters_are_merged_into_a_copy_if_they_can_be(diverged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    apply_method("lora", module, AdapterOptions(rank=2, bias="none"), head=module.head_name, mask_fn=module.mask_fn)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "lora_B" in name:
                value.fill_(float("nan") if diverged else 0.5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rolled_out: list[Any] = []

    def lock_step(policy: Any, envs: Any, *rest: Any) -> RolloutResult:
        rolled_out.append(policy.module)
        return RolloutResult("push-v3", *(np.zeros(1, bool),) * 2, np.zeros(1), 1, 0.0)

    monkeypatch.setattr(rollouts, "_lock_step", lock_step)
    evaluate(module, "push", episodes=1, **QUICK)
    assert has_adapters(rolled_out[0]) == diverged
    assert has_adapters(module)
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) or diverged for name, value in before.items())
    if not diverged:
        batch = next(iter(DataLoader(windows(), 4)))  # type: ignore[arg-type]
        with torch.no_grad():
            np.testing.assert_allclose(rolled_out[0].eval()(batch), module.eval()(batch), rtol=1e-5, atol=1e-6)


def test_equals_one_environment_at_a_time_by_hand() -> None:
    module = build().eval()
    result = evaluate(module, "faucet-close", episodes=3, environments=2, seed=7, mode="streaming", **QUICK)
    assert (result.task, len(result), result.steps) == ("faucet-close-v3", 3, 36)
    assert result.cpu_seconds > 0
    for episode in range(3):
        policy = DecisionTransformerPolicy(module, 1, 1000.0, "streaming")
        with MetaWorldEnvironment("faucet-close-v3", seed=7, split="eval", horizon=12) as env:
            (observation, _), reward, total, solved = env.reset(options={"goal": episode}), None, 0.0, []
            for _ in range(12):
                observation, value, _, _, info = env.step(policy.act(observation[None], reward)[0])
                reward = np.array([value])
                total += value
                solved.append(info["success"])
        assert result.returns[episode] == pytest.approx(total, rel=1e-4)
        assert result.successes[episode] == any(solved)
        assert result.final_successes[episode] == solved[-1]


def test_is_reproducible_and_leaves_no_trace() -> None:
    module = build(dropout=0.5).train()
    module.model.blocks[0].eval()
    modes = [m.training for m in module.modules()]
    weights = {n: v.clone() for n, v in module.state_dict().items()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]  # noqa: NPY002
    first = evaluate(module, "push-v3", episodes=3, **QUICK)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # type: ignore[index]  # noqa: NPY002
    assert random.getstate() == state[2]
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, weights[n]) for n, v in module.state_dict().items())
    again = evaluate(module, "push-v3", episodes=3, **QUICK)
    assert np.array_equal(first.returns, again.returns)
    other = evaluate(module, "push-v3", episodes=3, seed=1, **QUICK)
    assert not np.array_equal(first.returns, other.returns)


@pytest.mark.slow
def test_worker_processes_give_the_same() -> None:
    module = build()
    one = evaluate(module, "push-v3", episodes=3, environments=1, **QUICK)
    two = evaluate(module, "push-v3", episodes=3, environments=1, workers=2, **QUICK)
    np.testing.assert_allclose(one.returns, two.returns, rtol=1e-5)
    assert two.steps == one.steps


def test_a_trained_module_with_adapters_can_go_to_workers() -> None:
    module = build()
    callbacks = apply_method(
        "eva", module, AdapterOptions(rank=2, bias="none"), head=module.head_name, mask_fn=module.mask_fn
    )
    run = trainer(*callbacks, max_steps=2, max_epochs=-1)
    run.fit(module, DataLoader(windows(), 4))  # type: ignore[arg-type]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(rollouts._without_trainer(module))))
    assert module.trainer is run
    batch = next(iter(DataLoader(windows(), 4)))  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(twin.eval()(batch), module.eval()(batch))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_is_closed_when_interrupted(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    closed: list[Any] = []

    class Counting(MetaWorldEnvironment):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self)

        def step(self, action: Any) -> Any:
            raise error("stop")

        def close(self) -> None:
            closed.append(self)
            super().close()

    monkeypatch.setattr(rollout_environments, "MetaWorldEnvironment", Counting)
    module = build().train()
    with pytest.raises(error):
        evaluate(module, "push-v3", episodes=2, **QUICK)
    assert len(opened) == 2
    assert set(closed) == set(opened)
    assert module.training


def test_rates_and_returns() -> None:
    flags = np.array([True, False, True, True])
    result = RolloutResult("push-v3", flags, ~flags, np.array([1.0, 2.0, 3.0, 6.0]), 4, 1.0)
    assert (result.success_rate, result.final_success_rate, result.mean_return) == (0.75, 0.25, 3.0)
    joined = RolloutResult.join([result, result], seconds=2.0)
    assert (len(joined), joined.steps, joined.seconds, joined.success_rate) == (8, 8, 2.0, 0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes must be a whole number of at least 1, got 0"),
        ({"environments": 0}, "environments must be a whole number of at least 1, got 0"),
        ({"horizon": 501}, "horizon must be a whole number of at least 1 and of at most 500, got 501"),
        ({"context": 5}, "context must be a whole number of at least 1 and of at most 4, got 5"),
        ({"mode": "exakt"}, "unknown mode 'exakt': did you mean exact"),
        ({"make_env": "push-v2"}, "did you mean push-v3"),
        ({"video_episodes": 1}, "no video: MuJoCo can draw with neither"),
        ({"target_return": None}, "target_return is needed, the return to ask for"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_environments, "rendering_backend", lambda: None)
    options = {"make_env": "push-v3", **QUICK, **change}
    with pytest.raises(ValueError, match=message):
        evaluate(build(), **options)
