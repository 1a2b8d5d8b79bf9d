"""Means with 95% intervals, and paired differences between methods, of the comparison's runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]
Value = Callable[[Run], float]

# 97.5% points of Student's t distribution for 1 to 30 degrees of freedom
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95% interval (t distribution); None for a single value."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of `values`, at least one."""
        mean, n = statistics.fmean(values), len(values)
        return cls(mean, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None, n)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.half is not None and abs(self.mean) > self.half

    def text(self, digits: int = 3, sign: bool = False) -> str:
        """``0.123 ± 0.004``."""
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:.{digits}f}"


def t_quantile(degrees: int) -> float:
    """97.5% point of Student's t distribution."""
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    z = 1.959964
    return _T[degrees - 1] if degrees <= len(_T) else z + (z**3 + z) / (4 * degrees)


def loss_after(updates: int) -> Value:
    """Validation loss of a run after so many updates."""

    def value(run: Run) -> float:
        return next(float(row["val_loss"]) for row in run["val_loss"] if row["updates"] == updates)

    return value


def success(run: Run) -> float:
    """Share of a run's episodes solved at any step."""
    return float(run["success_rate"])


def over_seeds(runs: Sequence[Run], task: str, variant: str, value: Value) -> Interval | None:
    """Interval over the seeds of a task and method; None where there are no runs."""
    values = [value(run) for run in runs if run["task"] == task and run["variant"] == variant]
    return Interval.of(values) if values else None


def over_tasks(runs: Sequence[Run], tasks: Sequence[str], variant: str, value: Value) -> Interval | None:
    """Interval over seeds of the mean over `tasks`; seeds that lack a task are left out."""
    means = []
    for seed in sorted({run["seed"] for run in runs}):
        found = _by_task(runs, variant, seed)
        if all(task in found for task in tasks):
            means.append(statistics.fmean(value(found[task]) for task in tasks))
    return Interval.of(means) if means else None


def paired(
    runs: Sequence[Run], tasks: Sequence[str], first: str, second: str, value: Value, relative: bool = False
) -> Interval | None:
    """Interval over seeds of `first` minus `second`, run by run, averaged over `tasks`.

    Both of a pair have the same seed, so the same windows in the same order and the same evaluation goals. Seeds that
    lack one of the runs are left out.

    Args:
        runs: All runs.
        tasks: One task, or several to average over: the interval then is for these tasks, not for tasks in general.
        first, second: Variants.
        value: What to compare.
        relative: Take the difference of logarithms, and give it in percent: tasks of different scale then count alike.
    """
    differences = []
    for seed in sorted({run["seed"] for run in runs}):
        a, b = _by_task(runs, first, seed), _by_task(runs, second, seed)
        if all(task in a and task in b for task in tasks):
            pairs = [(value(a[task]), value(b[task])) for task in tasks]
            differences.append(statistics.fmean(100 * math.log(x / y) if relative else x - y for x, y in pairs))
    return Interval.of(differences) if differences else None


def _by_task(runs: Sequence[Run], variant: str, seed: int) -> dict[str, Run]:
    return {run["task"]: run for run in runs if run["variant"] == variant and run["seed"] == seed}
