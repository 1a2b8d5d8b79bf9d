"""What is said about rollouts of one network: success with its interval, and target returns that are too high."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from scipy.stats import binomtest

from experiments.runner.statistics import Range

#: A target return above this times the data's mean was measured to break tasks such as push.
HIGHEST_TARGET = 1.2

#: What brackets behind the success of one network are.
EPISODE_BRACKETS = "brackets: 95% interval over episodes (Wilson's, binomial)"

_LOGGER = logging.getLogger(__name__)


def success_range(successes: Sequence[bool]) -> Range:
    """Share of solved episodes with Wilson's 95% interval: episodes either are solved or not."""
    solved, n = sum(map(bool, successes)), len(successes)
    interval = binomtest(solved, n).proportion_ci(method="wilson")
    return Range(solved / n, float(interval.low), float(interval.high), n)


def warn_of_target(task: str, target: float, mean: float) -> None:
    """Log a warning where a target return is far above what the data has on average."""
    if target > HIGHEST_TARGET * mean > 0:
        _LOGGER.warning(
            "%s: the target return %.0f is %.2f times the mean return %.0f of its data; above %g times, some tasks "
            "(push) were measured to fail. --target-return sets another",
            task, target, target / mean, mean, HIGHEST_TARGET,
        )  # fmt: skip
