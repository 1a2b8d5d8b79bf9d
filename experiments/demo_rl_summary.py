"""From the robot runs of the demo to the numbers it reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eva_lightning.plots import mean_and_standard_error
from experiments.demo_rl_runs import METHODS, Before, RunResult
from experiments.demo_summary import Estimate

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Success:
    """Share of episodes solved at any step: mean over seeds, its standard error, and the count.

    The error is that over seeds, whose goals differ; of a single seed, that of a share, ``sqrt(p (1 - p) / n)``.
    """

    rate: Estimate
    solved: int
    episodes: int

    @classmethod
    def of(cls, runs: Sequence[Sequence[bool]]) -> Success:
        """Of the episodes of every seed."""
        rates = np.array([np.mean(run) for run in runs])
        solved, episodes = sum(map(sum, runs)), sum(map(len, runs))
        if len(runs) > 1:
            mean, error = (float(value) for value in mean_and_standard_error(rates))
        else:
            mean = float(rates[0])
            error = float(np.sqrt(mean * (1 - mean) / episodes))
        return cls(Estimate(mean, error), solved, episodes)

    def text(self) -> str:
        """``"0.70 ±0.10"``."""
        return self.rate.text(2)

    def count(self) -> str:
        """``"21 of 30"``."""
        return f"{self.solved} of {self.episodes}"


@dataclass(frozen=True)
class Row:
    """One method on one task; ``losses`` by number of updates."""

    task: str
    method: str
    learning_rate: float
    trained: float
    train_seconds: float
    losses: dict[int, Estimate]
    success: Success
    mean_return: float

    @property
    def name(self) -> str:
        return METHODS[self.method]

    def curve(self, low: float, high: float) -> str:
        """The losses as a line of blocks, from `low` to `high`."""
        span = (high - low) or 1.0
        places = [(value.mean - low) / span for value in self.losses.values()]
        return "".join(_BLOCKS[min(7, max(0, int(8 * place)))] for place in places)


def rows(results: Sequence[RunResult]) -> list[Row]:
    """A row per task and method, in the order in which they come; seconds are medians."""
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for result in results:
        groups.setdefault((result.run.task, result.run.method), []).append(result)
    table = []
    for (task, method), group in groups.items():
        updates = list(group[0].losses)
        mean, error = mean_and_standard_error(np.array([list(result.losses.values()) for result in group]))
        table.append(
            Row(
                task,
                method,
                group[0].run.learning_rate,
                float(np.mean([result.trained for result in group])),
                float(np.median([result.train_seconds for result in group])),
                {n: Estimate(float(m), float(e)) for n, m, e in zip(updates, mean, error, strict=True)},
                Success.of([result.successes for result in group]),
                float(np.mean([value for result in group for value in result.returns])),
            )
        )
    return table


def before_success(before: Sequence[Before], task: str) -> Success:
    """Success of the starting network on `task`."""
    return Success.of([entry.successes for entry in before if entry.task == task])


def losses_of(results: Sequence[RunResult], task: str) -> Mapping[str, np.ndarray]:
    """Validation losses on `task` of shape ``(seeds, updates)``, by the methods' names."""
    found: dict[str, list[list[float]]] = {}
    for result in results:
        if result.run.task == task:
            found.setdefault(METHODS[result.run.method], []).append(list(result.losses.values()))
    return {name: np.array(values) for name, values in found.items()}


def short(task: str) -> str:
    """Without the version."""
    return task.removesuffix("-v3")
