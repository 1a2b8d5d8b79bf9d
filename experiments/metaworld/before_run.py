"""Rollouts of the network that fine-tunings start from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eva_lightning.errors import MissingInputError
from eva_lightning.rl.demonstrations import load_task
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.rollouts import evaluate
from experiments.metaworld.before import RolloutSettings
from experiments.metaworld.measures import rollout_metrics
from experiments.runner.run_folder import RunFolder, Work


def build(settings: RolloutSettings) -> Work:
    """The rollouts that `settings` ask for.

    Raises:
        MissingInputError: The checkpoint is missing.
    """
    if not Path(settings.init).is_file():
        raise MissingInputError(f"there is no checkpoint {settings.init}")
    return partial(_roll_out, settings)


def target_return(data: str | Path, task: str, train_episodes: int | None) -> float:
    """The return to ask for: the largest of the training demonstrations."""
    return float(load_task(data, task, train_episodes).returns.max())


def _roll_out(settings: RolloutSettings, folder: RunFolder) -> Mapping[str, Any]:
    target, mode = settings.target_return, settings.mode
    if target is None:
        target = target_return(settings.data, settings.task, settings.train_episodes)
    result = evaluate(
        DecisionTransformerModule.from_pretrained(settings.init),
        settings.task,
        target_return=target,
        episodes=settings.episodes,
        seed=settings.seed,
        horizon=settings.horizon,
        mode=mode,  # type: ignore[arg-type]
    )
    return {"target_return": target, **rollout_metrics(result)}
