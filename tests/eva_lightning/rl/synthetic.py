"""Small made-up demonstrations with the properties of real ones that the data pipeline relies on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eva_lightning.rl.demonstrations import DemonstrationMeta, TaskDemonstrations, write_task


def synthetic_task(task: str, episodes: int = 4, horizon: int = 12, seed: int = 0) -> TaskDemonstrations:
    """Random frames, each repeated in the next state; actions that a linear map of the state gives."""
    rng = np.random.default_rng([seed, len(task)])
    frames = rng.normal(size=(episodes, horizon + 2, 18)).astype(np.float32)
    goals = np.repeat(rng.normal(size=(episodes, 1, 3)).astype(np.float32), horizon + 1, axis=1)
    observations = np.concatenate((frames[:, 1:], frames[:, :-1], goals), axis=-1)
    expert = np.clip(observations[:, :-1, :4] * 0.5, -1, 1).astype(np.float32)
    noise = rng.normal(scale=0.1, size=expert.shape).astype(np.float32)
    return TaskDemonstrations(
        task,
        observations,
        actions=np.clip(expert + noise, -1, 1),
        expert_actions=expert,
        rewards=rng.uniform(0, 10, size=(episodes, horizon)).astype(np.float32),
        successes=np.zeros((episodes, horizon), dtype=np.bool_),
        goals=np.arange(episodes),
    )


def write_synthetic(folder: Path, tasks: Sequence[str], episodes: int = 4, horizon: int = 12, seed: int = 0) -> Path:
    """Write made-up demonstrations of `tasks` to `folder`, and return it."""
    for task in tasks:
        write_task(folder, synthetic_task(task, episodes, horizon, seed), DemonstrationMeta(noise=0.1, seed=seed))
    return folder
