"""What acting costs beside the simulator: rollouts of the small Decision Transformer and a bare loop, interleaved.

The bare loop steps the same number of metaworld environments through the same goals with actions computed beforehand
(by the same policy, so that the simulator has the same work), and does nothing else. Ours is
:func:`eva_lightning.rl.rollouts.evaluate`, with the exact window and with the streaming cache. Both include resets and
neither the construction of environments. The ratio is the median over repeats of ours in steps per second ÷ the bare
loop's right before it. The bare loop uses one core, and ours as many as torch has threads; the ratio of processor time
says what one core would give, and hardly depends on what else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import metaworld
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS

from benchmarks.harness import Figure, Figures
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy, Mode
from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.tasks import HORIZON, resolve_task

TASKS = ("push-v3", "window-close-v3", "faucet-close-v3", "handle-press-side-v3")

_TARGET_RETURN = 1000.0


class Seconds(NamedTuple):
    """Of one run."""

    wall: float
    cpu: float


def measure(tasks: Sequence[str] = TASKS, environments: int = 50, repeats: int = 2, horizon: int = HORIZON) -> Figures:
    """Time the three, in this process.

    Args:
        tasks: Tasks to roll out, one after the other.
        environments: Environments in lock-step; one episode each.
        repeats: Timed runs per task.
        horizon: Steps per episode.

    Returns:
        ``rollout_exact_ratio``, ``rollout_streaming_ratio``: our steps per second ÷ those of the bare loop;
        ``rollout_exact_cpu_ratio``, ``rollout_streaming_cpu_ratio``: the same per second of processor time;
        ``rollout_raw_steps_per_second``, ``rollout_exact_steps_per_second``, ``rollout_streaming_steps_per_second``.
    """
    module = small_module()
    seconds: dict[str, list[Seconds]] = {"raw": [], "exact": [], "streaming": []}
    for task in map(resolve_task, tasks):
        for name, runs in _runs(module, task, environments, horizon, repeats).items():
            seconds[name] += runs
    wall, cpu = ({name: [run[k] for run in runs] for name, runs in seconds.items()} for k in range(2))
    steps = environments * horizon
    return {
        "rollout_exact_ratio": Figure.ratio(wall["raw"], wall["exact"], ">= 0.5"),
        "rollout_streaming_ratio": Figure.ratio(wall["raw"], wall["streaming"], ">= 0.8"),
        "rollout_exact_cpu_ratio": Figure.ratio(cpu["raw"], cpu["exact"]),
        "rollout_streaming_cpu_ratio": Figure.ratio(cpu["raw"], cpu["streaming"]),
        **{f"rollout_{name}_steps_per_second": Figure.of(steps / s for s in each) for name, each in wall.items()},
    }


def _runs(
    module: DecisionTransformerModule, task: str, environments: int, horizon: int, repeats: int
) -> dict[str, list[Seconds]]:
    """Each on one task, in turn."""

    def ours(mode: Mode) -> Seconds:
        result = evaluate(
            module,
            task,
            target_return=_TARGET_RETURN,
            episodes=environments,
            environments=environments,
            horizon=horizon,
            mode=mode,
        )
        return Seconds(result.seconds, result.cpu_seconds)

    actions = _actions(module, task, environments, horizon)
    simulators, goals = simulators_of(task, environments)
    runs: dict[str, Callable[[], Seconds]] = {
        "raw": lambda: bare_loop(simulators, goals, actions),
        "exact": partial(ours, "exact"),
        "streaming": partial(ours, "streaming"),
    }
    try:
        bare_loop(simulators, goals, actions[:, :2])
        rounds = [{name: run() for name, run in runs.items()} for _ in range(repeats)]
    finally:
        for simulator in simulators:
            simulator.close()
    return {name: [each[name] for each in rounds] for name in runs}


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
        observations = np.stack([env.reset(options={"goal": index})[0] for index, env in enumerate(envs)])
        rewards: npt.NDArray[np.float64] | None = None
        for step in range(horizon):
            actions[:, step] = policy.act(observations, rewards)
            rewards = np.empty(environments)
            for index, env in enumerate(envs):
                observations[index], rewards[index], *_ = env.step(actions[index, step])
    return actions


def simulators_of(task: str, environments: int) -> tuple[list[Any], list[Any]]:
    """metaworld's own environments, and the goal of each."""
    # the evaluation goals of seed 0
    goals = list(metaworld.MT1(task, seed=1).train_tasks)
    simulators = [ALL_V3_ENVIRONMENTS[task](reward_function_version="v2") for _ in range(environments)]
    return simulators, [goals[index % len(goals)] for index in range(environments)]


def bare_loop(simulators: Sequence[Any], goals: Sequence[Any], actions: npt.NDArray[np.float64]) -> Seconds:
    """One episode in each simulator, in lock-step as ours."""
    began, cpu_began = time.perf_counter(), time.process_time()
    for simulator, goal in zip(simulators, goals, strict=True):
        simulator.set_task(goal)
        simulator.reset()
    for step in range(actions.shape[1]):
        for simulator, action in zip(simulators, actions[:, step], strict=True):
            simulator.step(action)
    return Seconds(time.perf_counter() - began, time.process_time() - cpu_began)
