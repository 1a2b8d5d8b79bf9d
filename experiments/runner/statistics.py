"""Means, differences and interquartile means of repeated runs, with 95% intervals.

For independent samples i with means m_i, variances s_i² and sizes n_i, a weighted sum Σ c_i m_i has the variance
V = Σ v_i with v_i = c_i² s_i² / n_i. Its interval is Σ c_i m_i ± t(ν) √V, where t is the 97.5% point of Student's t
distribution with the Welch-Satterthwaite degrees of freedom ν = V² / Σ v_i² / (n_i - 1). Two samples with weights 1 and
-1 are Welch's t interval; a mean over tasks has weights 1/T, and its interval is one for these tasks and new seeds.

Runs of the same seed see the same data in the same order, so methods are compared run by run (:func:`paired`), which
takes out what they share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from rliable.library import get_interval_estimates
from rliable.metrics import aggregate_iqm
from scipy.special import stdtr, stdtrit

from eva_lightning.errors import check_number
from eva_lightning.side_effects import isolated_rng

#: What ± is, for every table.
PLUS_MINUS = "± is half the width of the 95% interval of the mean over seeds (Student's t distribution)."
#: What ± is where tasks are strata.
PLUS_MINUS_BY_TASK = (
    "± is half the width of the 95% interval of the mean over tasks (Student's t, spread over seeds within each task, "
    "Welch-Satterthwaite's degrees of freedom): for these tasks, not for tasks in general."
)
#: What brackets are, for every table with interquartile means.
BRACKETS = (
    "IQM is the mean of the middle half of all runs, in brackets its 95% interval (bootstrap over seeds, by task)."
)

_BOOTSTRAP_SAMPLES = 1_000

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95% interval (t distribution); None for a single value."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of `values`, at least one; NaN where one of them is NaN or infinite."""
        n = len(values)
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan if n > 1 else None, n)
        mean = statistics.fmean(values)
        return cls(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None, n)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def low(self) -> float:
        """Lower end; the mean itself where there is no width."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end; the mean itself where there is no width."""
        return self.mean + (self.half or 0.0)

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """``0.123 ± 0.004``; ``not finite`` where a value is NaN or infinite."""
        if not math.isfinite(self.mean):
            return "not finite"
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Range:
    """A figure with an interval that need not be symmetric; `n` runs per task."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """``0.52 [0.48, 0.57]``."""
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Sample:
    """What is known of repeated measurements: all of it that intervals need.

    Attributes:
        mean: Their mean.
        std: Their standard deviation, with n - 1 in the denominator; None for a single one.
        n: How many.
        resolution: What the mean was rounded to (0.1 where one digit is printed); 0: not rounded.
    """

    mean: float
    std: float | None
    n: int
    resolution: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """The sample `values`, at least one."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def weighted_sum(terms: Iterable[tuple[float, Sample]], comparisons: int = 1) -> Interval:
    """Interval of a weighted sum of independent means, as at the top of this file.

    Of several `comparisons` each has the level 1 - 0.05 / comparisons, so that all of them hold together with 95%
    (Bonferroni).
    A mean that was rounded adds the variance of its rounding error, resolution² / 12. `n` of the result is the smallest
    sample's; without a standard deviation in one of the samples there is no width.
    """
    known = list(terms)
    mean = math.fsum(weight * sample.mean for weight, sample in known)
    smallest = min(sample.n for _, sample in known)
    sampling = denominator = rounding = 0.0
    for weight, sample in known:
        if sample.std is None:
            return Interval(mean, None, smallest)
        variance = (weight * sample.std) ** 2 / sample.n
        sampling += variance
        denominator += variance**2 / (sample.n - 1)
        rounding += (weight * sample.resolution) ** 2 / 12
    total = sampling + rounding
    # of the sampling alone: rounding, whose variance is known, should not make an interval narrower
    degrees = sampling**2 / denominator if denominator > 0 else math.inf
    return Interval(mean, t_quantile(degrees, comparisons) * math.sqrt(total) if total > 0 else 0.0, smallest)


def mean_over(samples: Sequence[Sample], comparisons: int = 1) -> Interval:
    """Interval of the unweighted mean of independent means."""
    return weighted_sum(((1 / len(samples), sample) for sample in samples), comparisons)


def mean_difference(first: Sequence[Sample], second: Sequence[Sample]) -> Interval:
    """Interval of the mean over pairs of `first` minus `second`, all samples independent: for one pair Welch's.

    Args:
        first, second: Samples of the same tasks, in the same order.
    """
    weight = 1 / len(first)
    pairs = zip(first, second, strict=True)
    return weighted_sum(term for a, b in pairs for term in ((weight, a), (-weight, b)))


def t_quantile(degrees: float, comparisons: int = 1) -> float:
    """97.5% point of Student's t distribution, of the normal one for infinite `degrees`; of several comparisons that of
    1 - 0.025 / comparisons."""
    if degrees != math.inf:
        check_number("degrees of freedom", degrees, above=0)
    return float(stdtrit(degrees, 1 - 0.025 / comparisons))


def t_test(values: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's t test that the mean of `values` is 0; None for a single one.

    Values without any spread have a p of 0, or of 1 where they are 0.
    """
    if len(values) < 2:
        return None
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    if spread == 0:
        return float(mean == 0)
    return float(2 * stdtr(len(values) - 1, -abs(mean) / (spread / math.sqrt(len(values)))))


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down correction (1979): p-values that bound the chance of any false finding in the whole family.

    The i-th smallest of m is multiplied by m - i + 1, and none is smaller than one before it or larger than 1.
    """
    corrected: dict[Key, float] = {}
    largest = 0.0
    for before, (key, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        largest = min(1.0, max(largest, (len(p_values) - before) * p))
        corrected[key] = largest
    return {key: corrected[key] for key in p_values}


def mean_ranks(values: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Range]:
    """Rank of each method among all of them (1: the highest mean), averaged over tasks, with bootstrap intervals.

    Equal means share the mean of their ranks. Seeds are drawn anew within every method and task; the interval is
    between the 2.5% and 97.5% points of the mean ranks, for these tasks and new seeds.

    Args:
        values: Method -> for each task, in the same order, its values over seeds.
    """
    generator = np.random.default_rng(0)

    def means(draw: bool) -> np.ndarray:
        """Shape ``(draws, tasks, methods)``."""
        size = _BOOTSTRAP_SAMPLES if draw else 1
        columns = []
        for of_tasks in values.values():
            drawn = [
                np.asarray(found)[generator.integers(len(found), size=(size, len(found)))].mean(axis=1)
                if draw
                else np.full(1, np.mean(found))
                for found in of_tasks
            ]
            columns.append(np.stack(drawn, axis=1))
        return np.stack(columns, axis=2)

    def ranks(of: np.ndarray) -> np.ndarray:
        """Mean over tasks, shape ``(draws, methods)``."""
        other, own = of[..., None, :], of[..., :, None]
        return ((other > own).sum(axis=-1) + ((other == own).sum(axis=-1) + 1) / 2).mean(axis=1)

    found, drawn = ranks(means(draw=False))[0], ranks(means(draw=True))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return {
        method: Range(float(found[i]), float(low[i]), float(high[i]), min(map(len, of_tasks)))
        for i, (method, of_tasks) in enumerate(values.items())
    }


def over_seeds(runs: pd.DataFrame, value: str, by: str | list[str] = "method") -> dict[Any, Interval]:
    """Interval over the runs of each group.

    Args:
        runs: One row per run.
        value: Column that is averaged.
        by: Column or columns that define the groups, such as ``["task", "method"]``; the keys of the result.
    """
    return {key: Interval.of(group.astype(float).tolist()) for key, group in runs.groupby(by, sort=False)[value]}


def over_tasks(runs: pd.DataFrame, value: str) -> dict[Hashable, Interval]:
    """Interval over seeds of the mean over tasks, for each method; seeds that lack a task are left out.

    The interval is for these tasks, not for tasks in general.

    Args:
        runs: One row per run, with the columns ``method``, ``task`` and ``seed``; all its tasks count.
        value: Column that is averaged.
    """
    wide = _wide(runs, value)
    means = {key: wide[key].dropna().mean(axis=1) for key in runs["method"].unique()}
    return {key: Interval.of(list(found)) for key, found in means.items() if len(found)}


def paired(runs: pd.DataFrame, first: str, second: str, value: str, *, relative: bool = False) -> Interval | None:
    """Interval over seeds of `first` minus `second`, run by run, averaged over the tasks of `runs`.

    Both runs of a pair have the same task and seed, so the same data in the same order. Seeds that lack one of the runs
    are left out; the interval is for these tasks, not for tasks in general.

    Args:
        runs: One row per run, with the columns ``method``, ``seed`` and, of several tasks, ``task``.
        first, second: Methods.
        value: Column to compare.
        relative: Take the difference of logarithms, in percent: tasks of different scale then count alike.

    Returns:
        The interval, or None where no seed has all runs.
    """
    differences = paired_values(runs, first, second, value, relative=relative)
    return Interval.of(differences) if differences else None


def paired_values(runs: pd.DataFrame, first: str, second: str, value: str, *, relative: bool = False) -> list[float]:
    """The differences of :func:`paired`, one per seed; none where no seed has all runs."""
    wide = _wide(runs, value)
    if not {first, second} <= set(wide.columns.get_level_values(0)):
        return []
    a, b = wide[first], wide[second]
    return list((100 * np.log(a / b) if relative else a - b).dropna().mean(axis=1))


def by_task(runs: pd.DataFrame, value: str) -> dict[Hashable, Interval]:
    """Interval of the mean over tasks of each method, runs of different tasks taken as independent.

    Where tasks share nothing but the number of a seed, this has the width that the spread within tasks gives it, and
    more degrees of freedom than :func:`over_tasks`. Methods that lack a task are left out.
    """
    wide = _wide(runs, value)
    found = {key: _over_strata(wide[key]) for key in runs["method"].unique()}
    return {key: interval for key, interval in found.items() if interval is not None}


def paired_by_task(
    runs: pd.DataFrame, first: str, second: str, value: str, *, relative: bool = False, comparisons: int = 1
) -> Interval | None:
    """Interval of the mean over tasks of `first` minus `second`, run by run, tasks taken as independent.

    Args:
        runs, first, second, value, relative: See :func:`paired`.
        comparisons: Number of differences that are looked at together; the interval is corrected for it (Bonferroni).

    Returns:
        The interval, or None where a task has no pair.
    """
    wide = _wide(runs, value)
    if not {first, second} <= set(wide.columns.get_level_values(0)):
        return None
    a, b = wide[first], wide[second]
    return _over_strata(100 * np.log(a / b) if relative else a - b, comparisons)


def _over_strata(values: pd.DataFrame, comparisons: int = 1) -> Interval | None:
    """Interval of the mean of the columns' means; None where a column is empty."""
    columns = [list(values[task].dropna()) for task in values]
    return mean_over([Sample.of(column) for column in columns], comparisons) if all(columns) else None


def iqm(runs: pd.DataFrame, value: str) -> dict[Hashable, Range]:
    """Interquartile mean over all tasks and seeds of each method, with rliable's stratified bootstrap interval.

    Seeds are drawn anew within each task, the interval is between the 2.5% and 97.5% points of the resampled means
    (Agarwal et al. 2021). Seeds that lack a task are left out.
    """
    wide = _wide(runs, value)
    scores = {key: wide[key].dropna().to_numpy() for key in runs["method"].unique()}
    scores = {key: found for key, found in scores.items() if len(found)}
    with isolated_rng():
        np.random.seed(0)  # noqa: NPY002 - rliable draws from the global generator, whatever it is given
        means, intervals = get_interval_estimates(
            scores, lambda drawn: np.array([aggregate_iqm(drawn)]), reps=_BOOTSTRAP_SAMPLES
        )
    return {
        key: Range(float(means[key][0]), float(intervals[key][0, 0]), float(intervals[key][1, 0]), len(found))
        for key, found in scores.items()
    }


def _wide(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """`value` with a row per seed and a column per method and task; NaN where there is no run."""
    frame = runs if "task" in runs else runs.assign(task="task")
    wide = frame.astype({value: float}).pivot(index="seed", columns=["method", "task"], values=value)
    columns = pd.MultiIndex.from_product([frame["method"].unique(), frame["task"].unique()], names=["method", "task"])
    return wide.reindex(columns=columns)
