from __future__ import annotations

import numpy as np

from eva_lightning.rl.environments import MetaWorldEnvironment
from experiments.metaworld import benchmark_rollout


def test_rollouts_are_timed_against_a_bare_loop() -> None:
    figures = benchmark_rollout.measure(tasks=("push",), environments=2, repeats=1, horizon=6)
    assert set(benchmark_rollout.TARGETS) <= set(figures)
    assert len(figures) == 5
    assert all(value > 0 for value in figures.values())


def test_the_bare_loop_does_the_simulators_work_of_a_rollout() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4))
    simulators, goals = benchmark_rollout._simulators("push-v3", 2)
    benchmark_rollout._bare_loop(simulators, goals, actions)
    for index, simulator in enumerate(simulators):
        with MetaWorldEnvironment("push-v3", split="eval") as env:
            env.reset(index)
            for action in actions[index]:
                observation, *_ = env.step(action)
        np.testing.assert_allclose(simulator._get_obs()[:18], observation[:18])
        simulator.close()


def test_the_small_module_has_the_size_of_the_config() -> None:
    assert sum(p.numel() for p in benchmark_rollout.small_module().parameters()) == 607_236
