"""Pinned to Gymnasium: its registry, its checker, its time limit."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import eva_lightning.rl  # noqa: F401 - what registers the environments
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.registration import environment_id
from eva_lightning.rl.rendering import rendering_backend
from eva_lightning.rl.tasks import TASKS

NAME = "eva_lightning/MetaWorld-push-v3"


def test_gymnasiums_checker_passes() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        environment = gymnasium.make(NAME).unwrapped
        check_env(environment, skip_render_check=rendering_backend() is None)
    environment.close()
    # objects have no bounds; that is the only thing it has to say
    assert {str(warning.message).partition("space m")[2][:20] for warning in said} <= {
        "inimum value is -inf",
        "aximum value is infi",
    }


def test_made_by_its_name_it_is_the_class_under_gymnasiums_time_limit() -> None:
    assert environment_id("push") == NAME
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)
    with (
        gymnasium.make(NAME, split="eval", seed=3, max_episode_steps=4) as made,
        MetaWorldEnvironment("push", split="eval", seed=3) as direct,
    ):
        options = {"goal": 7}
        assert np.array_equal(made.reset(options=options)[0], direct.reset(options=options)[0])
        for step, action in enumerate(actions):
            observation, reward, terminated, truncated, info = made.step(action)
            expected = direct.step(action)
            assert np.array_equal(observation, expected[0])
            assert (reward, terminated, info) == (expected[1], expected[2], expected[4])
            assert truncated == (step == 3)
    assert gymnasium.spec(NAME).max_episode_steps == 200
    assert all(environment_id(task) in gymnasium.registry for task in TASKS)


def test_a_seed_draws_the_goal_where_none_is_named() -> None:
    with MetaWorldEnvironment("reach") as environment:
        first = [environment.reset(seed=5)[1], environment.reset()[1]]
        again = [environment.reset(seed=5)[1], environment.reset()[1]]
        assert first == again
        assert len({environment.reset(seed=seed)[1]["goal"] for seed in range(10)}) > 3


@pytest.mark.parametrize("goal", [-1, 1.5, "first"])
def test_a_goal_that_is_none_is_refused(goal: object) -> None:
    with MetaWorldEnvironment("reach") as environment, pytest.raises(ValueError, match="the goal of options must be"):
        environment.reset(options={"goal": goal})


@pytest.mark.parametrize("first", ["gymnasium", "eva_lightning.rl"])
def test_names_are_known_whichever_is_imported_first_and_nothing_heavy_is(first: str) -> None:
    second = {"gymnasium": "eva_lightning.rl", "eva_lightning.rl": "gymnasium"}[first]
    code = (
        f"import sys\nimport {first}\n"
        "heavy = {'gymnasium', 'numpy', 'torch', 'metaworld', 'mujoco'} & set(sys.modules)\n"
        f"import {second}\n"
        f"assert {NAME!r} in sys.modules['gymnasium'].registry\n"
        f"assert {first!r} == 'gymnasium' or not heavy, heavy\n"
        "assert 'metaworld' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
