"""Figure 4 from runs: ``python -m experiments.analysis gradients --runs runs/vtab``.

Takes every run below the folders that was made with ``--gradient-norms N`` (``experiments.vtab``, its sweep,
``experiments.metaworld finetune`` and ``compare``), and draws, for each task, the norm of the gradients and the
training loss over the first steps: means and standard deviations over seeds, a line per method. Runs that differ in
learning rate or rank get lines of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, option


@dataclass(frozen=True)
class Settings:
    """Which runs to draw."""

    runs: tuple[str, ...] = option(("runs",), "folders with runs, at any depth", Role.SELECTION)
    tasks: tuple[str, ...] | None = option(None, "tasks to draw; all that are there if not given", Role.SELECTION)
    steps: int | None = option(None, "first steps to draw; all that are there if not given", Role.SELECTION, at_least=1)
    output: str = option("runs/gradient-norms", "folder for the figures", Role.PLACE)


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.analysis gradients",
    (__doc__ or "").splitlines()[0],
    "experiments.analysis.gradient_norms_run:compare",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
