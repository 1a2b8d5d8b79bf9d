"""The runs of the robots comparison: fine-tunings on one task, and rollouts of the network they start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eva_lightning.errors import MissingInputError
from eva_lightning.files import file_digest
from eva_lightning.rl.demonstrations import load_task
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.rollouts import evaluate
from experiments.comparisons.source_digest import source_digest
from experiments.metaworld import finetune, finetune_run
from experiments.runner.jobs import Job
from experiments.runner.run_folder import RunFolder, Work
from experiments.runner.settings import Role, check_settings, option

PACKAGES = ("torch", "lightning", "peft", "metaworld", "mujoco")
_OF_A_RUN = Role.RESULT | Role.PER_RUN


@dataclass(frozen=True)
class FinetuningSettings(finetune.Settings):
    """A run of ``python -m experiments.metaworld finetune``, with what tells it from one of older code."""

    demonstrations: str = option("", "digest of how the demonstrations were collected", Role.RESULT)
    code: str = option("", "digest of code and library versions", Role.RESULT)


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts of the starting network, on the goals that fine-tunings of the same seed are measured on."""

    task: str = option(MISSING, "task", _OF_A_RUN)
    seed: int = option(MISSING, "seed of the goals", _OF_A_RUN)
    init: str = option(MISSING, "checkpoint", Role.RESULT, identity=file_digest)
    data: str = option(MISSING, "folder of demonstrations", Role.PLACE)
    train_episodes: int = option(MISSING, "demonstrations whose best return is asked for", Role.RESULT)
    episodes: int = option(10, "episodes", Role.RESULT, at_least=1)
    horizon: int = option(200, "steps of an episode", Role.RESULT, at_least=1)
    demonstrations: str = option("", "digest of how the demonstrations were collected", Role.RESULT)
    code: str = option("", "digest of code and library versions", Role.RESULT)

    def __post_init__(self) -> None:
        check_settings(self)


def code_of_runs() -> str:
    """Digest of what makes demonstrations, fine-tunings and rollouts."""
    own = [
        "experiments/metaworld/finetune.py",
        "experiments/metaworld/finetune_run.py",
        "experiments/metaworld/training.py",
    ]
    return source_digest(
        ["eva_lightning", "experiments/comparisons/robots_run.py", *own], ["eva_lightning/vision"], PACKAGES
    )


def build_finetuning(job: Job) -> Work:
    """The fine-tuning of a job with :class:`FinetuningSettings`."""
    return finetune_run.build(job.settings)


def build_rollouts(job: Job) -> Work:
    """The rollouts of a job with :class:`RolloutSettings`."""
    if not Path(job.settings.init).is_file():
        raise MissingInputError(f"there is no checkpoint {job.settings.init}")
    return partial(_roll_out, job.settings)


def target_return(data: str | Path, task: str, train_episodes: int) -> float:
    """The return to ask for: the largest of the training demonstrations."""
    return float(load_task(data, task, train_episodes).returns.max())


def _roll_out(settings: RolloutSettings, folder: RunFolder) -> Mapping[str, Any]:
    result = evaluate(
        DecisionTransformerModule.from_pretrained(settings.init),
        settings.task,
        target_return=target_return(settings.data, settings.task, settings.train_episodes),
        episodes=settings.episodes,
        seed=settings.seed,
        horizon=settings.horizon,
    )
    return {
        "successes": result.successes.tolist(),
        "final_successes": result.final_successes.tolist(),
        "returns": result.returns.tolist(),
    }
