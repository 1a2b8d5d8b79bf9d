"""Success and return of a checkpoint: ``python -m experiments.metaworld evaluate --ckpt CKPT --task push-v3``.

Takes checkpoints of ``pretrain`` and ``finetune``, with or without adapters, and folders of their runs. Success at any
step of the episode, as in Meta-World's benchmark, and success at its last step stand side by side. The work is in
``evaluate_run``.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from eva_lightning.rl.tasks import MAX_HORIZON, MAX_SEED, MODES, parse_tasks
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option

PLACE, RESULT = Role.PLACE, Role.RESULT


@dataclass(frozen=True)
class Settings:
    """What to roll out."""

    ckpt: str = option(MISSING, "checkpoint, or folder of a run, of pretrain or finetune", RESULT)
    task: tuple[str, ...] | None = option(None, "tasks such as push-v3, cw10 or mt40; the ckpt's if not given", RESULT)
    init: str | None = option(None, "checkpoint that adapters were trained on; none: the one ckpt names", RESULT)
    episodes: int = option(
        50, "episodes per task, of 50 different evaluation goals (the paper: 10 per seed)", RESULT, at_least=1
    )
    seed: int = option(0, "seed of the evaluation goals", RESULT, at_least=0, below=MAX_SEED)
    target_return: float | None = option(None, "return to ask for; none: the largest of the data", RESULT)
    data: str = option("data/metaworld", "demonstrations, for target returns that the checkpoint does not say", PLACE)
    mode: str = option("exact", "inference; streaming is faster", RESULT, choices=MODES)
    context: int | None = option(None, "steps of the window; those of training if not given", RESULT, at_least=1)
    environments: int | None = option(
        None, "episodes in lock-step, one network call for all; none: all, at most 50", PLACE, at_least=1
    )
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


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld evaluate",
    "Success and return of a checkpoint, measured in the simulator.",
    "experiments.metaworld.evaluate_run:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
