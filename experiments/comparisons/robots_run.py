"""The runs of the robots comparison: fine-tunings on one task, and rollouts of the network they start from."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.comparisons.source_digest import source_digest
from experiments.metaworld import before_run, finetune, finetune_run
from experiments.runner.jobs import Job
from experiments.runner.run_folder import Work
from experiments.runner.settings import Role, option

PACKAGES = ("torch", "lightning", "peft", "metaworld", "mujoco")


@dataclass(frozen=True)
class FinetuningSettings(finetune.Settings):
    """A run of ``python -m experiments.metaworld finetune``, with what tells it from one of older code."""

    demonstrations: str = option("", "digest of how the demonstrations were collected", Role.RESULT)
    code: str = option("", "digest of code and library versions", Role.RESULT)


def code_of_runs() -> str:
    """Digest of what makes demonstrations, fine-tunings and rollouts."""
    own = [
        "experiments/metaworld/before.py",
        "experiments/metaworld/before_run.py",
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
    """The rollouts of a job with :class:`~experiments.metaworld.before.RolloutSettings`."""
    return before_run.build(job.settings)
