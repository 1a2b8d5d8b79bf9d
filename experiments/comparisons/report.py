"""What the reports of all comparisons share: intervals, tables, sentences, and the files they are written to."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pandas import DataFrame
from scipy.stats import t as student_t

from eva_lightning.files import replacing, write_text
from experiments.comparisons.settings import FIRST_TUNING_SEED, MethodSettings
from experiments.runner.comparison import Results
from experiments.runner.statistics import PLUS_MINUS, Interval
from experiments.runner.tables import markdown

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
    def of(cls, settings: MethodSettings, runs: DataFrame) -> Evidence:
        """That of the finished runs of a comparison."""
        present = set(runs.get("method", ()))
        return cls(runs, {key: label for key, label in settings.labels.items() if key in present})

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


def spread(runs: DataFrame, column: str, by: str) -> DataFrame:
    """`runs` with a column ``loss_10`` for each entry ``{by: 10, "loss": ...}`` of the lists in `column`."""
    rows = [
        {f"{name}_{entry[by]}": value for entry in entries for name, value in entry.items() if name != by}
        for entries in runs[column]
    ]
    return runs.drop(columns=column).join(DataFrame(rows, index=runs.index))


def cell(interval: Interval | None, digits: int, sign: bool = False) -> str:
    """An interval as tables have it; bold where it is that of a difference and excludes 0."""
    if interval is None:
        return ""
    text = interval.text(digits, sign)
    return f"**{text}**" if sign and interval.excludes_zero else text


def table(corner: str, head: Iterable[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table: label -> cells."""
    return markdown(DataFrame.from_dict(rows, orient="index", columns=list(head)).rename_axis(corner).reset_index())


def means_table(evidence: Evidence, quantities: Sequence[Quantity], corner: str = "") -> str:
    """One line per method, one column per quantity."""
    rows = {
        label: [cell(evidence.mean(key, each), each.digits) for each in quantities]
        for key, label in evidence.labels.items()
    }
    return table(corner, [each.title for each in quantities], rows)


def differences_table(evidence: Evidence, quantities: Sequence[Quantity], methods: Sequence[str]) -> str:
    """One line per method, its differences to the reference."""
    rows = {
        evidence.labels[key]: [cell(evidence.difference(key, REFERENCE, each), each.digits, sign=True) for each in quantities]
        for key in methods
    }
    return "Bold where the interval excludes 0.\n\n" + table("", [each.title for each in quantities], rows)


def difference_sentence(evidence: Evidence, first: str, second: str, quantities: Sequence[Quantity]) -> list[str]:
    """How `first` differs from `second` in every quantity, as a line of a list; none where no run says."""
    found = [(each, evidence.difference(first, second, each)) for each in quantities]
    words = [
        f"{each.title} {interval.text(each.digits, sign=True)}{_verdict(interval)}"
        for each, interval in found
        if interval is not None
    ]
    return [f"- {evidence.labels[first]} minus {evidence.labels[second]}: {'; '.join(words)}."] if words else []


def _verdict(interval: Interval) -> str:
    if interval.half is None:
        return ""
    return " (significant)" if interval.excludes_zero else " (not significant)"


def significance_sentence(evidence: Evidence, quantity: Quantity, methods: Sequence[str]) -> list[str]:
    """Which methods differ significantly from the reference, as a line of a list; none where no interval is known."""
    found = {key: evidence.difference(key, REFERENCE, quantity) for key in methods}
    known = {key: interval for key, interval in found.items() if interval is not None and interval.half is not None}
    if not known:
        return []
    better = 1 if quantity.higher_is_better else -1
    words = []
    for name, sign in (("better", better), ("worse", -better)):
        members = [(key, each) for key, each in known.items() if each.excludes_zero and each.mean * sign > 0]
        members.sort(key=lambda member: -abs(member[1].mean))
        listed = [
            f"{evidence.labels[key]} ({each.mean:+.{quantity.digits}f}{'*' * remains(each, len(known))})"
            for key, each in members
        ]
        words.append(f"{name} than {evidence.labels[REFERENCE]}: {', '.join(listed) or 'none'}")
    same = sum(not interval.excludes_zero for interval in known.values())
    title = quantity.title[0].upper() + quantity.title[1:]
    return [f"- {title}: {'; '.join(words)}; no significant difference: {same} of {len(known)}."]


def remains(interval: Interval, comparisons: int) -> bool:
    """Whether 0 lies outside of the interval also at the level 1 - 0.05 / `comparisons` (Bonferroni)."""
    if interval.half is None:
        return False
    corrected, plain = student_t.ppf([1 - 0.025 / comparisons, 0.975], interval.n - 1)
    return bool(abs(interval.mean) > corrected / plain * interval.half)


SIGNIFICANCE = (
    f"{PLUS_MINUS} Differences are taken within a seed and called significant where their interval excludes 0. Intervals "
    "are not corrected for the number of comparisons: where no method differs from another, one in twenty would still "
    "exclude 0. A star marks what remains after Bonferroni's correction for the number of methods."
)


def learning_rates(
    settings: MethodSettings, results: Results, criterion: str, shown: Callable[[float], str]
) -> str:
    """What each learning rate was worth in tuning, the one chosen in bold.

    Args:
        settings: What was asked for.
        results: With the choice of each method.
        criterion: What was minimised, in words.
        shown: Text of a score.
    """
    tuned = {key: choice for key, choice in results.choices.items() if choice.candidates}
    if not tuned:
        return "All were given."
    scores = {key: {point.get("lr"): score[0] for point, score in c.candidates.items()} for key, c in tuned.items()}
    tried = sorted({lr for by_rate in scores.values() for lr in by_rate})
    rows, edges = {}, []
    for key, by_rate in scores.items():
        chosen, label = tuned[key].point.get("lr"), settings.labels[key]
        texts = {lr: shown(score) if math.isfinite(score) else "diverged" for lr, score in by_rate.items()}
        rows[label] = [f"**{texts[lr]}**" if lr == chosen else texts.get(lr, "") for lr in tried]
        if chosen in (min(by_rate), max(by_rate)):
            edges.append(label)
    text = (
        f"{criterion}, {settings.tune_seeds} seed(s) from {FIRST_TUNING_SEED}, which the comparison does not use; the "
        "lowest is chosen, by method."
    )
    if settings.extend:
        text += " Where the lowest is at an edge of the grid, the next learning rate beyond is tried."
    if edges:
        text += f" Still at an edge, so perhaps not the best there is: {', '.join(edges)}."
    return f"{text}\n\n" + table("", [f"{lr:g}" for lr in tried], rows)


def mean_column(runs: DataFrame, method: str, column: str, digits: int) -> str:
    """Mean of a column over a method's runs, as text; empty where it has none."""
    values = runs.loc[runs["method"] == method, column].dropna() if column in runs else []
    return f"{np.mean(values):,.{digits}f}" if len(values) else ""


def state_of(results: Results, wanted: int) -> str:
    """A paragraph on what failed or is missing; empty where all runs are there."""
    if results.failures:
        lines = [f"- {job}: {error.strip().splitlines()[-1]}" for job, error in results.failures]
        return "\n".join([f"**{len(lines)} runs failed** and are not in the tables:", "", *lines])
    return "" if len(results.runs) == wanted else f"**Unfinished:** {len(results.runs)} of {wanted} runs."


def machine() -> str:
    """Cores and kind of this machine."""
    return f"{os.cpu_count()} cores ({platform.machine()})"


def write_report(
    folder: str | Path, parts: Sequence[str], figures: Mapping[str, tuple[Figure, str]], runs: DataFrame
) -> Path:
    """Write ``report.md``, ``results.csv`` and the figures.

    Args:
        folder: Where.
        parts: Of the report, in order; a name of `figures` stands for the figure; empty ones are left out.
        figures: Name -> figure and its description.
        runs: One row per run.

    Returns:
        The report.
    """
    folder = Path(folder)
    with replacing(folder / "results.csv") as file:
        runs.to_csv(file, index=False)
    for name, (figure, _) in figures.items():
        with replacing(folder / f"{name}.png") as file:
            figure.savefig(file, dpi=110)
    texts = [f"![{figures[part][1]}]({part}.png)" if part in figures else part for part in parts]
    report = folder / "report.md"
    write_text(report, "\n\n".join(text for text in texts if text) + "\n")
    return report
