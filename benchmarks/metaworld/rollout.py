"""What acting costs beside the simulator: rollouts of the small Decision Transformer and a bare loop, interleaved.

The bare loop steps the same number of metaworld environments through the same goals with actions computed beforehand
(by the same policy, so that the simulator has the same work), and does nothing else. Ours is
:func:`eva_lightning.rl.rollouts.evaluate`, with the exact window and with the streaming cache. Both include resets and
neither the construction of environments. The ratio is the median over repeats of ours in steps per second ÷ the bare
loop's right before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import metaworld
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from benchmarks.harness import Figure, Figures, in_turn
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy
from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.tasks import HORIZON, resolve_task

TASKS = ("push-v3", "window-close-v3", "faucet-close-v3", "handle-press-side-v3")

_TARGET_RETURN = 1000.0


def measure(tasks: Sequence[str] = TASKS, environments: int = 20, repeats: int = 2, horizon: int = HORIZON) -> Figures:
    """Time the three, in this process.

    Args:
        tasks: Tasks to roll out, one after the other.
        environments: Environments in lock-step; one episode each.
        repeats: Timed runs per task.
        horizon: Steps per episode.

    Returns:
        ``rollout_exact_ratio``, ``rollout_streaming_ratio``: our steps per second ÷ those of the bare loop;
        ``rollout_raw_steps_per_second``, ``rollout_exact_steps_per_second``, ``rollout_streaming_steps_per_second``.
    """
    module = small_module()
    seconds: dict[str, list[float]] = {"raw": [], "exact": [], "streaming": []}
    for task in map(resolve_task, tasks):
        for name, values in _task(module, task, environments, repeats, horizon).items():
            seconds[name] += values
    steps = environments * horizon
    return {
        "rollout_exact_ratio": Figure.ratio(seconds["raw"], seconds["exact"], ">= 0.3"),
        "rollout_streaming_ratio": Figure.ratio(seconds["raw"], seconds["streaming"], ">= 0.5"),
        **{f"rollout_{name}_steps_per_second": Figure.of(steps / s for s in each) for name, each in seconds.items()},
    }


def _task(
    module: DecisionTransformerModule, task: str, environments: int, repeats: int, horizon: int
) -> dict[str, list[float]]:
    """Seconds of each on one task."""

    def ours(mode: Literal["exact", "streaming"]) -> float:
        result = evaluate(
            module,
            task,
            target_return=_TARGET_RETURN,
            episodes=environments,
            environments=environments,
            horizon=horizon,
            mode=mode,
        )
        return result.seconds

    actions = _actions(module, task, environments, horizon)
    simulators, goals = simulators_of(task, environments)
    try:
        bare_loop(simulators, goals, actions[:, :2])
        return in_turn(
            {
                "raw": lambda: bare_loop(simulators, goals, actions),
                "exact": partial(ours, "exact"),
                "streaming": partial(ours, "streaming"),
            },
            repeats,
        )
    finally:
        for simulator in simulators:
            simulator.close()


def small_module() -> DecisionTransformerModule:
    """The small network of ``configs/metaworld/pretrain_small.yaml``, untrained."""
    return DecisionTransformerModule(width=128, layers=3, heads=4, context=10, dropout=0.1)


def _actions(module: DecisionTransformerModule, task: str, environments: int, horizon: int) -> npt.NDArray[np.float64]:
    """What the policy does in each environment, ``(environments, horizon, 4)``."""
    actions = np.empty((environments, horizon, 4))
    policy = DecisionTransformerPolicy(module, environments, _TARGET_RETURN, "streaming")
    with ExitStack() as stack:
        envs = [
            stack.enter_context(MetaWorldEnvironment(task, split="eval", horizon=horizon)) for _ in range(environments)
        ]
        observations = np.stack([env.reset(index) for index, env in enumerate(envs)])
        rewards: npt.NDArray[np.float64] | None = None
        for step in range(horizon):
            actions[:, step] = policy.act(observations, rewards)
            rewards = np.empty(environments)
            for index, env in enumerate(envs):
                observations[index], rewards[index], _, _ = env.step(actions[index, step])
    return actions


def simulators_of(task: str, environments: int) -> tuple[list[Any], list[Any]]:
    """metaworld's own environments, and the goal of each."""
    # the evaluation goals of seed 0
    goals = list(metaworld.MT1(task, seed=1).train_tasks)
    simulators = [ALL_V3_ENVIRONMENTS[task](reward_function_version="v2") for _ in range(environments)]
    return simulators, [goals[index % len(goals)] for index in range(environments)]


def bare_loop(simulators: Sequence[Any], goals: Sequence[Any], actions: npt.NDArray[np.float64]) -> float:
    """Seconds of one episode in each simulator, in lock-step as ours."""
    began = time.perf_counter()
    for simulator, goal in zip(simulators, goals, strict=True):
        simulator.set_task(goal)
        simulator.reset()
    for step in range(actions.shape[1]):
        for simulator, action in zip(simulators, actions[:, step], strict=True):
            simulator.step(action)
    return time.perf_counter() - began
