"""Success and return of a checkpoint: ``python -m experiments.metaworld evaluate --ckpt CKPT --task push-v3``.

Takes checkpoints of ``pretrain`` and ``finetune``, with or without adapters, and folders of their runs. Success means
solved at any step of the episode, as in Meta-World's benchmark; success at the last step is given too. The work is in
``evaluate_run``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING

from eva_lightning.rl.tasks import MAX_HORIZON, MAX_SEED, parse_tasks
from experiments.runner.cli import in_terminal
from experiments.runner.settings import Role, check_settings, option, parse_settings

if TYPE_CHECKING:
    from eva_lightning.rl.rollouts import RolloutResult

PLACE, RESULT = Role.PLACE, Role.RESULT


@dataclass(frozen=True)
class Settings:
    """What to roll out."""

    ckpt: str = option(MISSING, "checkpoint, or folder of a run, of pretrain or finetune", RESULT)
    task: tuple[str, ...] | None = option(None, "tasks such as push-v3, cw10 or mt40; the ckpt's if not given", RESULT)
    init: str | None = option(
        None, "for a ckpt with adapters alone: what they were trained on; finetune's say it themselves", RESULT
    )
    episodes: int = option(50, "episodes per task; there are 50 different evaluation goals", RESULT, at_least=1)
    seed: int = option(0, "seed of the evaluation goals", RESULT, at_least=0, below=MAX_SEED)
    target_return: float | None = option(None, "return to ask for; the largest of the task's data if not given", RESULT)
    data: str = option("data/metaworld", "demonstrations, for target returns that the checkpoint does not say", PLACE)
    mode: str = option(
        "exact", "inference: exact window, or streaming (faster)", RESULT, choices=("exact", "streaming")
    )
    context: int | None = option(None, "steps of the window; those of training if not given", RESULT, at_least=1)
    environments: int = option(20, "episodes in lock-step, one network call for all", PLACE, at_least=1)
    workers: int = option(0, "processes; 0 for none besides this one", PLACE, at_least=0)
    horizon: int = option(200, "steps of an episode", RESULT, at_least=1, at_most=MAX_HORIZON)
    video: str | None = option(None, "film some episodes to this file, .gif or .mp4", PLACE)
    video_episodes: int = option(3, "episodes to film", PLACE, at_least=1)
    video_size: int = option(240, "height and width of the film, in pixels", PLACE, at_least=1)
    progress: bool = option(True, "show a progress bar", PLACE)

    def __post_init__(self) -> None:
        if self.task is not None:
            object.__setattr__(self, "task", parse_tasks(self.task))
        check_settings(self)


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = "Success and return of a checkpoint, measured in the simulator."
    return parse_settings(Settings, "python -m experiments.metaworld evaluate", description, args)


def main(args: Sequence[str] | None = None) -> list[RolloutResult]:
    """Run the command line `args` (``sys.argv`` for None), print a table and return the results.

    Raises:
        MissingInputError: The checkpoint or the demonstrations are missing.
        InputError: A setting or the checkpoint is wrong.
    """
    settings = parse(args)
    from experiments.metaworld.evaluate_run import run

    return run(settings)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal, giving the exit status."""
    return in_terminal(main, args)
