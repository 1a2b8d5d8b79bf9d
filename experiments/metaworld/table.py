"""Runs beside the paper's Tables 23 and 24: ``python -m experiments.metaworld table --runs runs/metaworld``.

Reads the ``metrics.json`` of every finished ``finetune`` run below a folder and writes ``table.md``, ``table.csv`` and
``table.png``. The paper's numbers, and where they are from, are in ``paper_tables.csv``; the work is in
``table_report``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.runner.cli import in_terminal
from experiments.runner.settings import Role, option, parse_settings


@dataclass(frozen=True)
class Settings:
    """Which runs, and where to write."""

    runs: str = option("runs/metaworld", "folder with runs of finetune, at any depth", Role.PLACE)
    out: str | None = option(None, "folder for table.md, table.csv and table.png; RUNS if not given", Role.PLACE)


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = "Runs beside the paper's Tables 23 and 24."
    return parse_settings(Settings, "python -m experiments.metaworld table", description, args)


def main(args: Sequence[str] | None = None) -> str:
    """Write the three files and return the Markdown, which is printed too.

    Raises:
        MissingInputError: There are no finished runs.
        InputError: Runs are damaged, or two are of the same settings.
    """
    settings = parse(args)
    from experiments.metaworld.table_report import write_report

    return write_report(settings)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal, giving the exit status."""
    return in_terminal(main, args)
