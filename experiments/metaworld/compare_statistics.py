"""Means with 95% intervals, and paired differences between methods, of the comparison's runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.runner.statistics import Interval

__all__ = ["Interval", "Run", "Value", "loss_after", "over_seeds", "over_tasks", "paired", "success"]

Run = Mapping[str, Any]
Value = Callable[[Run], float]


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
