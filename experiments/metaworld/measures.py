"""What is said about rollouts of one network: success with its interval, and target returns that are too high."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scipy.stats import binomtest

from experiments.metaworld.success import Definition, definitions
from experiments.runner.statistics import Interval, Range
from experiments.runner.tables import cell

if TYPE_CHECKING:
    from eva_lightning.rl.rollouts import RolloutResult

#: A target return above this times the data's mean was measured to break tasks such as push.
HIGHEST_TARGET = 1.2

#: What brackets behind the success of one network are.
EPISODE_BRACKETS = "brackets: 95% interval over episodes (Wilson's, binomial)"

_LOGGER = logging.getLogger(__name__)


def rollout_metrics(result: RolloutResult) -> dict[str, Any]:
    """What ``metrics.json`` holds of rollouts."""
    return {
        "success_rate": result.success_rate,
        "final_success_rate": result.final_success_rate,
        "mean_return": result.mean_return,
        "successes": result.successes.tolist(),
        "final_successes": result.final_successes.tolist(),
        "returns": result.returns.tolist(),
        "rollout_seconds": result.seconds,
        "rollout_steps": result.steps,
    }


def success_range(successes: Sequence[bool]) -> Range:
    """Share of solved episodes with Wilson's 95% interval: episodes either are solved or not."""
    return _wilson(sum(map(bool, successes)), len(successes))


def _wilson(solved: int, n: int) -> Range:
    interval = binomtest(solved, n).proportion_ci(method="wilson")
    return Range(solved / n, float(interval.low), float(interval.high), n)


def success_of(metrics: Mapping[str, Any], definition: Definition) -> Range | None:
    """Success of a run by `definition`; None where its metrics, made earlier or without rollouts, do not have it."""
    episodes, rate = metrics.get(definition.episodes), metrics.get(definition.rate)
    if episodes:
        return success_range(episodes)
    if rate is None or not metrics.get("episodes"):
        return None
    return _wilson(round(rate * metrics["episodes"]), metrics["episodes"])


def success_text(metrics: Mapping[str, Any]) -> str:
    """Success of a run by both definitions, as part of a sentence."""
    return ", ".join(f"{each.title} {cell(success_of(metrics, each))}" for each in definitions())


def rates_text(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean success of several runs by both definitions, with intervals over them, as part of a sentence."""
    found = {each.title: [run.get(each.rate) for run in runs] for each in definitions()}
    return ", ".join(
        f"{title} {cell(None if None in rates else Interval.of([float(rate) for rate in rates if rate is not None]))}"
        for title, rates in found.items()
    )


def warn_of_target(task: str, target: float, mean: float) -> None:
    """Log a warning where a target return is far above what the data has on average."""
    if target > HIGHEST_TARGET * mean > 0:
        _LOGGER.warning(
            "%s: the target return %.0f is %.2f times the mean return %.0f of its data; above %g times, some tasks "
            "(push) were measured to fail. --target-return sets another",
            task, target, target / mean, mean, HIGHEST_TARGET,
        )  # fmt: skip
