"""What comparisons of the demo share: a learning rate for every method, chosen by ``--tune`` and kept in a file."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.files import write_json
from experiments.report import learning_rates as rates
from experiments.report import page
from experiments.report.terminal import say, show
from experiments.runner.calling import as_called
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.options import RunnerOptions
from experiments.runner.settings import Role, option

FIRST_TUNING_SEED = 1000


@dataclass(frozen=True, kw_only=True)
class TunedSettings(RunnerOptions):
    """Settings of such a comparison; its configuration file has this layout."""

    learning_rates: dict[str, float] | None = option(None, "learning rate of every method", Role.SELECTION)
    tuning: dict[str, Any] | None = option(None, "how they were chosen, as --tune writes it", Role.SELECTION)
    tune: str | None = option(None, "choose the learning rates and write them to this file", Role.SELECTION)
    lrs: tuple[float, ...] = option((1e-3, 3e-3, 1e-2, 3e-2), "to choose from", Role.SELECTION, above=0)


class TunedComparison(Comparison):
    """Tunes one learning rate per method, or compares the methods at the rates given.

    Args:
        options: Its settings.
        command: The command that repeats it.

    Attributes:
        section: What a page says about it; set by :meth:`report`.
        first_look: May be given a section before all runs are done.
        methods: Keys of the methods compared.
        packages: Libraries whose behaviour the figures depend on.
        header: First line of the configuration file.
        rule: How the learning rates are chosen, in words.
        tune_command: The command that chooses them; of an instance the one that has chosen its rates.
    """

    methods: tuple[str, ...]
    packages: tuple[str, ...]
    header: str
    rule: str
    tune_command: str

    files = ("results.json", *(f"before_after.{suffix}" for suffix in ("gif", "mp4", "png", "json")))

    def __init__(self, options: TunedSettings, command: str = "") -> None:
        self.options: TunedSettings = options
        self.section: page.Section | None = None
        self.first_look: Callable[[page.Section], None] | None = None
        self.command = command
        self.tune_command = as_called(self.tune_command)
        self.started = time.time()
        self.rates = {} if options.tune else rates.check_rates(options.learning_rates, self.methods)
        if not options.tune:
            rates.check_tuning(options.tuning)

    def cells(self) -> list[Cell]:
        """One per method with all learning rates in tuning, else those of :meth:`final_cells`."""
        if not self.options.tune:
            return self.final_cells()
        points = [Point.of(lr=lr) for lr in self.options.lrs]
        return [Cell(method, points, partial(self._tuning_jobs, method), no_jobs) for method in self.methods]

    def final_cells(self) -> list[Cell]:
        """What is compared; made by :meth:`final_cell`."""
        return [self.final_cell(method, lr) for method, lr in self.rates.items()]

    def final_cell(self, method: str, lr: float) -> Cell:
        """The final runs of `method` at a learning rate that is given."""
        return Cell(f"{method} at {lr:g}", [], no_jobs, partial(self._final_jobs, method), Point.of(lr=lr))

    @abstractmethod
    def jobs(self, method: str, lr: float, phase: Phase) -> list[Job]:
        """Runs of a method, over seeds and perhaps tasks."""

    @abstractmethod
    def scores(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Mean scores of tuning runs: ``method``, ``lr`` and columns for :meth:`scores_table`."""

    @abstractmethod
    def scores_table(self, scores: pd.DataFrame, chosen: Mapping[str, float]) -> page.Table:
        """What :meth:`scores` gives, with the rates chosen."""

    @abstractmethod
    def tuning_record(self) -> dict[str, Any]:
        """What else to note about the tuning, but for its rule and scores."""

    @abstractmethod
    def report_runs(self, runs: pd.DataFrame) -> page.Section:
        """Print the tables, and return the section."""

    def report(self, results: Results) -> None:
        """Write the learning rates chosen, or print the tables, write ``results.json`` and make the section."""
        if self.options.tune:
            self._write_choice(results)
            return
        # NaN is what a row lacks that others have
        records = results.runs.astype(object).where(results.runs.notna(), None).to_dict("records")
        section = self.report_runs(results.runs)
        data = page.runs_as_data(self.name, f"{len(records)} runs of the comparison on {self.name}", records)
        self.section = replace(section, data=data)
        write_json(Path(self.options.output) / "results.json", records)

    def facts(self, between: Mapping[str, str], folders: Sequence[str]) -> dict[str, str]:
        """What a page says at its beginning.

        Args:
            between: Facts of this comparison.
            folders: Of the fine-tuning runs.
        """
        versions = page.versions(self.packages)
        return {
            "Machine": page.machine(),
            "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            **between,
            "Fine-tuning runs": page.finished_when(folders, self.started),
            "Time of this call": f"{time.time() - self.started:.0f} s",
        }

    def tuning(self, **more: Any) -> rates.Tuning:
        """How the learning rates were chosen; `more` are sentences and figures."""
        chosen, known = rates.chosen_in_words(self.rates), self.options.tuning
        scores = rates.scores_of(known)
        if known is None or scores.empty:
            return rates.Tuning(chosen)
        table, seeds = self.scores_table(scores, self.rates), rates.seeds_in_words(known["seeds"])
        return rates.Tuning(chosen, known["rule"], seeds, self.tune_command, table, **more)

    def _tuning_jobs(self, method: str, point: Point) -> list[Job]:
        return self.jobs(method, point.get("lr"), "tune")

    def _final_jobs(self, method: str, point: Point) -> list[Job]:
        return self.jobs(method, point.get("lr"), "final")

    def _write_choice(self, results: Results) -> None:
        scores, chosen = self.scores(results.tuning), rates.chosen_rates(results.choices)
        show(self.scores_table(scores, chosen))
        record = {"rule": self.rule, **self.tuning_record(), "scores": scores.to_dict("records")}
        header = f"# {self.header} Learning rates written by: {self.tune_command}\n"
        rates.write_choice(Path(self.options.tune or ""), header, chosen, record)
        say(f"Learning rates written to {self.options.tune}.")


def no_jobs(point: Point) -> list[Job]:
    """For cells that are not tuned, or only tuned."""
    return []
