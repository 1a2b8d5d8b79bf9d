from __future__ import annotations

import numpy as np

from benchmarks.metaworld import rollout
from eva_lightning.rl.environments import MetaWorldEnvironment


def test_rollouts_are_timed_against_a_bare_loop() -> None:
    figures = rollout.measure(tasks=("push",), environments=2, repeats=1, horizon=6)
    assert figures["rollout_exact_ratio"].target == ">= 0.5"
    assert figures["rollout_streaming_ratio"].target == ">= 0.8"
    assert len(figures) == 7
    assert all(figure.median > 0 for figure in figures.values())


def test_the_bare_loop_does_the_simulators_work_of_a_rollout() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4))
    simulators, goals = rollout.simulators_of("push-v3", 2)
    rollout.bare_loop(simulators, goals, actions)
    for index, simulator in enumerate(simulators):
        with MetaWorldEnvironment("push-v3", split="eval") as env:
            env.reset(options={"goal": index})
            for action in actions[index]:
                observation, *_ = env.step(action)
        np.testing.assert_allclose(simulator._get_obs()[:18], observation[:18])
        simulator.close()


def test_the_small_module_has_the_size_of_the_config() -> None:
    assert sum(p.numel() for p in rollout.small_module().parameters()) == 607_236
