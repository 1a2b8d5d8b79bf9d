"""Import published trajectories: ``python -m experiments.metaworld import --from DIR --tasks cw10 --out data/l2m``.

Takes the data set of Schmied et al. (2024), which the paper trains on, from a folder or from the Hugging Face hub, and
writes what ``collect`` writes. Safe to interrupt; rerun to resume. Formats are described in
``eva_lightning.rl.published``; the work is in ``importing_run``.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from eva_lightning.rl.tasks import HORIZON, MAX_HORIZON, parse_tasks
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option

PLACE, RESULT, SELECTION = Role.PLACE, Role.RESULT, Role.SELECTION


@dataclass(frozen=True)
class Settings:
    """Everything one import is asked to do."""

    from_: str = option(MISSING, "folder of the data set, or hub:ml-jku/meta-world to download it", PLACE)
    tasks: tuple[str, ...] = option(("cw10",), "mt40, cw10, or task names such as push-v3,reach-v3", SELECTION)
    episodes: int | None = option(None, "only the first so many of each task; none: all (10,000)", RESULT, at_least=1)
    horizon: int = option(HORIZON, "steps that every episode must have", RESULT, at_least=1, at_most=MAX_HORIZON)
    revision: str | None = option(None, "branch, tag or commit of the hub's data set; none: the newest", RESULT)
    downloads: str | None = option(None, "folder for downloads; none: the hub client's own cache", PLACE)
    out: str = option("data/metaworld", "folder for one file per task and index.json", PLACE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", parse_tasks(self.tasks))
        check_settings(self)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld import",
    "Import the published trajectories that the paper trains on.",
    "experiments.metaworld.importing_run:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
