"""What the runs of a comparison say: means over seeds and differences within seeds, with 95% intervals."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

from pandas import DataFrame

from experiments.comparisons.settings import MethodSettings, adapts
from experiments.runner.statistics import Interval, over_tasks, paired

#: What every method is compared with, run by run.
REFERENCE = "lora"

#: Method -> what it is compared with one by one.
BASELINES = {"eva": (REFERENCE,), "eva-dora": (REFERENCE, "dora")}

_FIRST = ("task", "method", "rank", "rho", "seed", "lr")


@dataclass(frozen=True)
class Quantity:
    """Something measured of every run.

    Attributes:
        column: Its column in the table of runs.
        title: What it is called.
        unit: Its unit, if any.
        digits: Digits behind the point.
        scale: What values are multiplied by: 100 for percent.
        higher_is_better: Otherwise lower is.
        relative: Differences are 100 × the difference of logarithms: tasks of different scale count alike.
    """

    column: str
    title: str
    unit: str = ""
    digits: int = 3
    scale: float = 1.0
    higher_is_better: bool = False
    relative: bool = False

    @property
    def heading(self) -> str:
        """What tables and figures call it."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def of(self, runs: DataFrame) -> DataFrame:
        """`runs` with their values in the column ``value``."""
        return runs.assign(value=self.scale * runs[self.column])


@dataclass(frozen=True)
class Evidence:
    """Intervals of finished runs over seeds, of the mean over tasks where there are several.

    Seeds that lack a run are left out. Intervals are for these tasks, not for tasks in general.

    Attributes:
        runs: One row per run, with ``method``, ``seed``, ``task`` and the columns of quantities.
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
            by: What identifies an entry of that list.
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

    @property
    def adapters(self) -> list[str]:
        """Those of them that have adapters; training everything differs too much to be drawn in the same figure."""
        return list(filter(adapts, self.against_reference))

    def means(self, quantity: Quantity) -> dict[Hashable, Interval]:
        """Interval of the mean of each method; without those of which no seed has all tasks."""
        return over_tasks(quantity.of(self.runs), "value")

    def difference(self, first: str, second: str, quantity: Quantity) -> Interval | None:
        """Interval of `first` minus `second` within seed and task, where both have the same data in the same order.

        None where no seed has both.
        """
        return paired(quantity.of(self.runs), first, second, "value", relative=quantity.relative)


def _flat(runs: DataFrame, column: str, by: str) -> DataFrame:
    """Plain columns only: ``loss_10`` for each entry ``{by: 10, "loss": ...}`` of the lists in `column`, and the sum of
    EVA's ranks."""
    rows = [
        {f"{name}_{entry[by]}": value for entry in entries for name, value in entry.items() if name != by}
        for entries in runs[column]
    ]
    if "ranks" in runs:
        ranks = [sum(each.values()) if isinstance(each, dict) else None for each in runs["ranks"]]
        runs = runs.assign(total_rank=ranks)
    nested = [name for name in runs if runs[name].map(lambda value: isinstance(value, list | dict)).any()]
    flat = runs.drop(columns=[*nested, "path"], errors="ignore").join(DataFrame(rows, index=runs.index))
    return flat[sorted(flat, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))]
