"""What the runs of a comparison say: means over seeds and differences within seeds, with 95% intervals."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from pandas import DataFrame

from experiments.comparisons.settings import MethodSettings
from experiments.runner.statistics import Interval

#: What every method is compared with, run by run.
REFERENCE = "lora"

#: Method -> what it is compared with one by one.
BASELINES = {"eva": (REFERENCE,), "eva-dora": (REFERENCE, "dora")}


@dataclass(frozen=True)
class Quantity:
    """Something measured of every run.

    Attributes:
        column: Its column in the table of runs.
        title: How tables name it.
        digits: Digits behind the point.
        scale: What values are multiplied by: 100 for percent.
        higher_is_better: Otherwise lower is.
        relative: Differences are 100 × the difference of logarithms, about percent: tasks of different scale count
            alike.
    """

    column: str
    title: str
    digits: int = 3
    scale: float = 1.0
    higher_is_better: bool = False
    relative: bool = False


@dataclass(frozen=True)
class Evidence:
    """Intervals of finished runs over seeds, of the mean over tasks where there are several.

    Seeds that lack a run are left out. Intervals are for these tasks, not for tasks in general.

    Attributes:
        runs: One row per run, with ``method``, ``seed``, perhaps ``task``, and the columns of quantities.
        labels: Key -> label of the methods that have runs, in the order of tables.
    """

    runs: DataFrame
    labels: Mapping[str, str]

    @classmethod
    def of(cls, settings: MethodSettings, runs: DataFrame, column: str, by: str) -> Evidence:
        """That of the finished runs of a comparison.

        Args:
            settings: What is compared.
            runs: One row per run: its tags and metrics.
            column: Where each has a list of what was measured during training, such as ``{"epoch": 2, "loss": 1.3}``;
                a column ``loss_2`` takes its place.
            by: What entries of that list are told apart by.
        """
        present = set(runs["method"])
        return cls(_flat(runs, column, by), {key: label for key, label in settings.labels.items() if key in present})

    def on(self, task: str) -> Evidence:
        """The same for one of the tasks."""
        return Evidence(self.runs[self.runs["task"] == task], self.labels)

    def among(self, methods: Collection[str]) -> Evidence:
        """The same for some of the methods."""
        return Evidence(self.runs, {key: label for key, label in self.labels.items() if key in methods})

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """EVA and what it is compared with one by one."""
        found = [(key, baseline) for key in self.labels for baseline in BASELINES.get(key.partition(":")[0], ())]
        return [pair for pair in found if pair[1] in self.labels]

    @property
    def against_reference(self) -> list[str]:
        """The methods that can be compared with the reference."""
        return [key for key in self.labels if key != REFERENCE] if REFERENCE in self.labels else []

    def mean(self, method: str, quantity: Quantity) -> Interval | None:
        """Interval of a method's mean; None where there are no runs."""
        return _interval(self._values(method, quantity))

    def difference(self, first: str, second: str, quantity: Quantity) -> Interval | None:
        """Interval of `first` minus `second`, within seed and task: both of a pair have the same data in the same order.

        None where no seed has both.
        """
        a, b = (self._values(method, quantity) for method in (first, second))
        return _interval(100 * (np.log(a) - np.log(b)) if quantity.relative else a - b)

    def _values(self, method: str, quantity: Quantity) -> DataFrame:
        """Seeds x tasks."""
        runs = self.runs if "task" in self.runs else self.runs.assign(task="")
        values = runs[runs["method"] == method].pivot_table(quantity.column, "seed", "task")
        return quantity.scale * values.reindex(columns=runs["task"].unique())


def _interval(values: DataFrame) -> Interval | None:
    complete = values.dropna()
    return Interval.of(complete.mean(axis="columns").tolist()) if len(complete) else None


def _flat(runs: DataFrame, column: str, by: str) -> DataFrame:
    """Plain columns only: ``loss_10`` for each entry ``{by: 10, "loss": ...}`` of the lists in `column`, and the sum of
    EVA's ranks."""
    rows = [
        {f"{name}_{entry[by]}": value for entry in entries for name, value in entry.items() if name != by}
        for entries in runs[column]
    ]
    ranks = runs["ranks"] if "ranks" in runs else []
    totals = {"total_rank": [sum(each.values()) if isinstance(each, dict) else None for each in ranks] or None}
    nested = [name for name in runs if runs[name].map(lambda value: isinstance(value, list | dict)).any()]
    return runs.drop(columns=nested).assign(**totals).join(DataFrame(rows, index=runs.index))
