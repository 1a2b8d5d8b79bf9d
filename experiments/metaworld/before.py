"""Settings of rollouts of the network that fine-tunings start from; they are done in ``before_run``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from eva_lightning.rl.tasks import MODES
from experiments.metaworld.finetune import checkpoint_identity
from experiments.runner.settings import Role, check_settings, option

_OF_A_RUN = Role.RESULT | Role.PER_RUN


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts of the starting network, on the goals that fine-tunings are measured on."""

    task: str = option(MISSING, "task", _OF_A_RUN)
    seed: int = option(MISSING, "seed of the goals", _OF_A_RUN)
    init: str = option(MISSING, "checkpoint", Role.RESULT, identity=checkpoint_identity)
    data: str = option(MISSING, "folder of demonstrations", Role.PLACE)
    train_episodes: int | None = option(MISSING, "demonstrations whose best return is asked for", Role.RESULT)
    target_return: float | None = option(None, "return to ask for, instead", Role.RESULT, omit_default=True)
    episodes: int = option(10, "episodes", Role.RESULT, at_least=1)
    horizon: int = option(200, "steps of an episode", Role.RESULT, at_least=1)
    mode: str = option("exact", "inference", Role.RESULT, choices=MODES, omit_default=True)
    demonstrations: str = option("", "digest of how the demonstrations were collected", Role.RESULT)
    code: str = option("", "digest of code and library versions", Role.RESULT)

    def __post_init__(self) -> None:
        check_settings(self)
