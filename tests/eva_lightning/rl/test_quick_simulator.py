"""Pinned to metaworld's own classes, bit for bit."""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.quick_simulator import QuickSimulator, quick_class
from eva_lightning.rl.tasks import TASKS


def _compare(task: str, steps: int) -> None:
    """Two episodes of the expert with noise and one of noise alone, in environments that are used again."""
    with MetaWorldEnvironment(task, split="eval") as ours:
        plain: Any = ALL_V3_ENVIRONMENTS[task](reward_function_version="v2")
        expert = ENV_POLICY_MAP[task]()  # type: ignore[abstract]
        rng = np.random.default_rng(0)
        for goal, share in ((3, 1.0), (17, 0.0), (3, 1.0)):
            plain.set_task(ours._goals[goal])
            expected = plain.reset()[0]
            assert ours.reset(options={"goal": goal})[0].tobytes() == expected.tobytes()
            for _ in range(steps):
                action = np.clip(share * expert.get_action(expected) + rng.normal(0, 0.1, 4), -1, 1)
                expected, reward, _, _, info = plain.step(action)
                observation, gained, _, _, found = ours.step(action)
                assert observation.tobytes() == expected.tobytes()
                assert (gained, found) == (reward, info)
        plain.close()


# push takes hold of an object, faucet-close and window-close place the arm by methods of their own, lever-pull reads
# orientations that only the simulator fills in
@pytest.mark.parametrize("task", ["push-v3", "faucet-close-v3", "window-close-v3", "lever-pull-v3"])
def test_observations_rewards_and_success_are_metaworlds(task: str) -> None:
    _compare(task, steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_observations_rewards_and_success_are_metaworlds_in_every_task(task: str) -> None:
    _compare(task, steps=40)


def test_no_task_has_its_own_of_what_is_overridden() -> None:
    # but for _reset_hand and reset_model, which call what they override
    overridden = set(vars(QuickSimulator)) & set(dir(ALL_V3_ENVIRONMENTS["push-v3"])) - set(vars(object))
    ours = {name for name in overridden if callable(getattr(QuickSimulator, name))} - {"_reset_hand", "reset_model"}
    assert ours == {"_initialize_simulation", "_get_curr_obs_combined_no_goal", "reset", "touching_object"}
    for task in TASKS:
        owners = {next(c for c in ALL_V3_ENVIRONMENTS[task].__mro__ if name in vars(c)).__name__ for name in ours}
        assert owners == {"SawyerXYZEnv", "MujocoEnv"}, task


def test_a_pinched_object_is_touched() -> None:
    plain: Any = ALL_V3_ENVIRONMENTS["push-v3"](reward_function_version="v2")
    with MetaWorldEnvironment("push-v3", split="eval") as env:
        plain.set_task(env._goals[0])
        observation = plain.reset()[0]
        expert, found = ENV_POLICY_MAP["push-v3"](), set()  # type: ignore[abstract]
        for _ in range(60):
            observation = plain.step(np.clip(expert.get_action(observation), -1, 1))[0]
            geom = plain.data.geom("objGeom").id
            found.add(plain.touching_object(geom))
            assert QuickSimulator.touching_object(plain, geom) == plain.touching_object(geom)
    plain.close()
    assert found == {True, False}


def test_models_are_compiled_once_and_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    first = quick_class("window-close-v3")(reward_function_version="v2")
    monkeypatch.setattr(mujoco.MjModel, "from_xml_path", None)  # so that compiling fails
    second = quick_class("window-close-v3")(reward_function_version="v2")
    before = second.model.body_pos.copy()
    first.model.body_pos[:] += 1.0
    assert np.array_equal(second.model.body_pos, before)
    assert second.data.qpos.shape == (second.model.nq,)
