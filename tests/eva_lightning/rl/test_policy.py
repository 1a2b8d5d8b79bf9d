from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eva_lightning.adapters import has_adapters
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.rl import policy as policies
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy, Mode

N, STEPS = 3, 23


def module(**changes: Any) -> DecisionTransformerModule:
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 3, "heads": 4, "context": 8, "dropout": 0.5, **changes}
    made = DecisionTransformerModule([0.1] * 39, [0.7] * 39, **sizes)
    # larger than at the start of training, so that actions differ
    torch.nn.init.normal_(made.model.predict_action.weight, std=0.3)
    return made


def play(policy: DecisionTransformerPolicy, steps: int = STEPS) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    observations, rewards = rng.normal(size=(steps, N, 39)), rng.uniform(0, 10, size=(steps, N))
    actions = [policy.act(observations[t], rewards[t - 1] if t else None) for t in range(steps)]
    return observations, rewards, np.stack(actions)


def full_forward(made: DecisionTransformerModule, played: Any, target: Any, start: int, t: int) -> Any:
    """Action of step t, by the module's own forward on the window from `start`."""
    observations, rewards, actions = (torch.as_tensor(a[start : t + 1]).float().transpose(0, 1) for a in played)
    spent = np.concatenate((np.zeros((1, N)), played[1].cumsum(axis=0)))[start : t + 1]
    to_go = torch.as_tensor(target - spent).float().T
    n = t + 1 - start
    batch = {
        "states": observations, "actions": actions, "rewards": rewards, "returns_to_go": to_go,
        "timesteps": torch.arange(start, t + 1).expand(N, n), "mask": torch.ones(N, n, dtype=torch.bool),
    }  # fmt: skip
    with torch.no_grad():
        return made.eval()(batch)[:, -1].clamp(-1, 1).double().numpy()


@pytest.mark.parametrize("positions", ["global", "timestep"])
@pytest.mark.parametrize("context", [1, 3, 8])
def test_exact_mode_is_the_forward_on_the_last_steps(context: int, positions: str) -> None:
    made = module(positions=positions)
    target = np.array([100.0, 1000.0, 2000.0])
    played = play(DecisionTransformerPolicy(made, N, target, context=context))
    for t in range(STEPS):
        expected = full_forward(made, played, target, max(0, t + 1 - context), t)
        np.testing.assert_allclose(played[2][t], expected, rtol=0, atol=2e-6)
    assert played[2].dtype == np.float64
    assert np.abs(played[2]).max() <= 1
    assert played[2].std() > 0.01


@pytest.mark.parametrize("positions", ["global", "timestep"])
def test_streaming_mode_is_the_forward_on_at_least_half_the_context(positions: str) -> None:
    made = module(positions=positions)
    target = np.full(N, 500.0)
    played = play(DecisionTransformerPolicy(made, N, 500.0, mode="streaming"))
    starts = [0] * 8 + [4] * 4 + [8] * 4 + [12] * 4 + [16] * 3
    for t in range(STEPS):
        expected = full_forward(made, played, target, starts[t], t)
        np.testing.assert_allclose(played[2][t], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_adapters_count(mode: Mode) -> None:
    made = module()
    apply_method("lora", made, AdapterOptions(rank=2, bias="none"), head=made.head_name, mask_fn=made.mask_fn)
    assert has_adapters(made)
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    played = play(DecisionTransformerPolicy(made, N, 500.0, mode), steps=9)
    starts = [0] * 8 + [1 if mode == "exact" else 4]
    for t, start in enumerate(starts):
        expected = full_forward(made, played, np.full(N, 500.0), start, t)
        np.testing.assert_allclose(played[2][t], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 61, 90, 91])
def test_environments_in_parts_are_environments_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = module()
    at_once = play(DecisionTransformerPolicy(made, N, 500.0))[2]
    calls: list[int] = []
    act = made.model.act
    monkeypatch.setattr(made.model, "act", lambda part, *cache: (calls.append(len(part)), act(part, *cache))[1])
    monkeypatch.setattr(policies, "_TOKENS_PER_CALL", tokens)
    np.testing.assert_allclose(play(DecisionTransformerPolicy(made, N, 500.0))[2], at_once, rtol=0, atol=2e-6)
    # a window of 8 steps has 30 tokens, and three of them 90
    assert calls[8:] == {1: [1, 1, 1], 61: [2, 1], 90: [3], 91: [3]}[tokens] * 15


@pytest.mark.parametrize("mode", ["exact", "streaming"])
def test_reset_starts_anew_and_modes_stay(mode: Mode) -> None:
    made = module().train()
    made.model.blocks[0].eval()
    policy = DecisionTransformerPolicy(made, N, 500.0, mode=mode)
    first = play(policy)[2]
    policy.reset()
    assert np.array_equal(first, play(policy)[2])
    assert made.training
    assert not made.model.blocks[0].fc1.training


@pytest.mark.parametrize("mode", ["exact", "streaming"])
@pytest.mark.parametrize("after", [3, 11])
def test_the_environments_that_are_kept_go_on_as_they_would_have(mode: Mode, after: int) -> None:
    made, targets = module(), np.array([100.0, 1000.0, 2000.0])
    observations, rewards, expected = play(DecisionTransformerPolicy(made, N, targets, mode))
    policy, rows = DecisionTransformerPolicy(made, N, targets, mode), [2, 0]
    for t in range(STEPS):
        if t == after:
            policy.keep(rows)
        kept = rows if t >= after else [0, 1, 2]
        actions = policy.act(observations[t, kept], rewards[t - 1, kept] if t else None)
        np.testing.assert_allclose(actions, expected[t, kept], rtol=0, atol=2e-6)
    policy.reset()
    again = policy.act(observations[0, rows])
    np.testing.assert_allclose(again, expected[0, rows], rtol=0, atol=2e-6)


def test_target_return_matters() -> None:
    made = module()
    low, high = (play(DecisionTransformerPolicy(made, N, target), 1)[2] for target in (0.0, 3000.0))
    assert np.abs(low - high).max() > 1e-4


def test_rewards_are_asked_for() -> None:
    policy = DecisionTransformerPolicy(module(), N, 500.0)
    with pytest.raises(ValueError, match="must be None at the first step"):
        policy.act(np.zeros((N, 39)), np.zeros(N))
    policy.act(np.zeros((N, 39)))
    with pytest.raises(ValueError, match="are needed after the first step of an episode, at step 1"):
        policy.act(np.zeros((N, 39)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_environments": 0}, "n_environments must be a whole number of at least 1, got 0"),
        ({"mode": "exakt"}, "did you mean exact"),
        ({"context": 9}, "context must be a whole number of at least 1 and of at most 8, got 9"),
        ({"target_return": [1.0, 2.0]}, "one finite number or 3"),
        ({"target_return": float("nan")}, "one finite number or 3"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecisionTransformerPolicy(module(), **{"n_environments": N, "target_return": 1.0, **arguments})
