"""Collect demonstrations: ``python -m experiments.metaworld collect --tasks cw10 --episodes 100``.

Safe to interrupt; rerun to resume. With more episodes it adds those that are missing. Files, and the index beside them,
are described in ``eva_lightning.rl.demonstrations``; the work is in ``collect_run``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from eva_lightning.rl.tasks import MAX_HORIZON, MAX_SEED, parse_tasks
from experiments.runner.command import SettingsCommand
from experiments.runner.ending import was_interrupted
from experiments.runner.settings import Role, check_settings, option

PLACE, RESULT, SELECTION = Role.PLACE, Role.RESULT, Role.SELECTION


@dataclass(frozen=True)
class Settings:
    """Everything one collection is asked to do."""

    tasks: tuple[str, ...] = option(("mt40",), "mt40, cw10, or task names such as push-v3,reach-v3", SELECTION)
    episodes: int = option(100, "episodes per task; a task that has more keeps them", SELECTION, at_least=1)
    noise: float = option(0.1, "standard deviation of the noise on the expert's action", RESULT, at_least=0)
    seed: int = option(0, "seed of goals and noise", RESULT, at_least=0, below=MAX_SEED)
    horizon: int = option(200, "steps per episode", RESULT, at_least=1, at_most=MAX_HORIZON)
    workers: int = option(1, "processes; the result does not depend on it", PLACE, at_least=1)
    out: str = option("data/metaworld", "folder for one file per task and index.json", PLACE)
    minari: bool = option(False, "also export Minari data sets, metaworld/push/expert-v0, ...", SELECTION)
    minari_path: str | None = option(None, "folder for them; none: OUT/minari", PLACE)
    progress: bool = option(True, "show a progress bar", PLACE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", parse_tasks(self.tasks))
        check_settings(self)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld collect",
    "Collect demonstrations by metaworld's scripted experts.",
    "experiments.metaworld.collect_run:run",
)
parse, main = COMMAND.parse, COMMAND.main


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal, giving the exit status; one sentence also where a process fails (1)."""
    try:
        status = COMMAND.command_line(args)
    except BrokenProcessPool as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if was_interrupted(status):
        print("interrupted: finished episodes are kept; rerun to resume", file=sys.stderr)
    return status
