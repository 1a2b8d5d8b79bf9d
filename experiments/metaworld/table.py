"""Runs beside the paper's Tables 23 and 24: ``python -m experiments.metaworld table --runs runs/metaworld``.

Reads the ``metrics.json`` of every finished ``finetune`` run below a folder and writes ``table.md``, ``table.csv`` and
``table.png``. The paper's numbers, and where they are from, are in ``paper_tables.csv``; the work is in
``table_report``.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.metaworld.success import DEFINITIONS, PAPERS
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option


@dataclass(frozen=True)
class Settings:
    """Which runs, and where to write."""

    runs: str = option("runs/metaworld", "folder with runs of finetune, at any depth", Role.PLACE)
    success: str = option(
        PAPERS.name, "definition of success that stands first, beside the paper's numbers: final (step) or any",
        Role.SELECTION, choices=DEFINITIONS,
    )  # fmt: skip
    out: str | None = option(None, "folder for table.md, table.csv and table.png; RUNS if not given", Role.PLACE)

    def __post_init__(self) -> None:
        check_settings(self)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.metaworld table",
    "Runs beside the paper's Tables 23 and 24.",
    "experiments.metaworld.table_report:write_report",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
