"""Minari data sets of real environments with random actions, for tests."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import minari
import numpy as np
from minari.data_collector.episode_buffer import EpisodeBuffer


def stacked(values: Sequence[Any]) -> Any:
    """Observations or actions as Minari stores them: an array, or a dict of arrays."""
    if isinstance(values[0], dict):
        return {key: np.stack([value[key] for value in values]) for key in values[0]}
    return np.stack(values)


def record(name: str, env: gymnasium.Env[Any, Any], steps: Sequence[int]) -> minari.MinariDataset:
    """Write a data set called `name` of one episode of so many steps each, fewer where the environment ends it."""
    env.action_space.seed(0)
    buffers = []
    for number, length in enumerate(steps):
        observations, actions, rewards, ends = [env.reset(seed=number)[0]], [], [], []
        while len(rewards) < length and not any(ends[-1:]):
            actions.append(env.action_space.sample())
            observation, reward, terminated, _, _ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(float(reward))
            ends.append(terminated)
        buffers.append(
            EpisodeBuffer(
                id=number,
                seed=number,
                observations=stacked(observations),
                actions=stacked(actions),
                rewards=rewards,
                terminations=ends,
                truncations=[False] * (len(ends) - 1) + [not ends[-1]],
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(name, buffers, env=env)


class Reach(gymnasium.Env[Any, Any]):
    """A goal environment as Gymnasium-Robotics has them: a point goes to where it is told, and is done there."""

    def __init__(self, success: str | None = "is_success") -> None:
        box = gymnasium.spaces.Box(-10, 10, (2,), np.float64)
        names = ("achieved_goal", "desired_goal", "observation")
        self.observation_space = gymnasium.spaces.Dict(dict.fromkeys(names, box))
        # no bounds in one direction
        low, high = np.array([[-np.inf, -0.5], [np.inf, 1.5]], dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(low, high)
        self.success = success

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Any]:
        assert action in gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        assert -0.5 <= action[1] <= 1.5
        self.place = np.clip(self.place + 0.1 * action, -10, 10)
        distance = float(np.linalg.norm(self.place - self.goal))
        near = distance < 0.5
        return self._observation(), -distance, near, False, {} if self.success is None else {self.success: near}

    def _observation(self) -> Any:
        return {"achieved_goal": self.place.copy(), "desired_goal": self.goal.copy(), "observation": self.place.copy()}
