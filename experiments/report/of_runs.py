"""A page on any finished runs: ``python -m experiments.report RUN...``; ``vtab report`` and ``metaworld report`` alike.

Each RUN is the folder of a run, or one that holds such folders at any depth, as a sweep leaves it. Runs of images and
of robots may stand on one page, a section for each task. Reading and drawing are in ``runs_page``.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option


@dataclass(frozen=True)
class Settings:
    """The options of the report."""

    runs: tuple[str, ...] = option(
        MISSING, "folders of finished runs, or folders that hold some at any depth", Role.SELECTION, positional=True
    )
    out: str = option("runs/report.html", "file of the page", Role.PLACE)
    title: str = option("Report", "title of the page", Role.PLACE)
    maps: int = option(6, "most rank maps of a task", Role.SELECTION, at_least=0)

    def __post_init__(self) -> None:
        check_settings(self)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.report",
    "A page on any finished runs: methods, settings that differ, measures with intervals, loss curves, rank maps.",
    "experiments.report.runs_page:report",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
