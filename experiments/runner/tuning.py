"""How tuning chooses: one algorithm for every comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.runner.jobs import Point

Score = tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """What tuning came to.

    Attributes:
        point: The settings chosen.
        score: Its mean score; empty where the point was given.
        candidates: Mean score of every point that has all its runs.
    """

    point: Point
    score: Score
    candidates: Mapping[Point, Score]


def mean_scores(scores: Mapping[Point, Sequence[Score]], runs: int) -> dict[Point, Score]:
    """Mean score over the runs of each point; points with fewer than `runs` are left out.

    A number that is not finite (diverged) counts as infinite: as the worst.
    """
    return {point: _mean(found) for point, found in scores.items() if found and len(found) >= runs}


def choose(scores: Mapping[Point, Sequence[Score]], runs: int = 1) -> Choice | None:
    """The point of the least mean score.

    Scores are compared number by number, so (-accuracy, loss) is the highest accuracy and, among equals (accuracies of
    200 images are multiples of 0.5%), the lowest loss. Then the smaller rank counts, the smaller ρ, and the smaller
    learning rate.

    Args:
        scores: Point -> scores of its finished runs, over seeds and perhaps tasks.
        runs: How many runs a point must have to be chosen.

    Returns:
        The choice, or None where no point has all its runs and a finite score.
    """
    means = mean_scores(scores, runs)
    finite = [point for point, score in means.items() if math.isfinite(score[0])]
    if not finite:
        return None
    best = min(finite, key=lambda point: _order(point, means[point]))
    return Choice(best, means[best], means)


def best_of_each(choice: Choice, name: str) -> dict[float, Point]:
    """The best candidate of each value that a setting was tuned over, in order of the values."""
    found: dict[float, Point] = {}
    for point in sorted(choice.candidates, key=lambda point: _order(point, choice.candidates[point])):
        if choice.candidates[point] and math.isfinite(choice.candidates[point][0]):
            found.setdefault(point.get(name), point)
    return dict(sorted(found.items()))


def beyond(means: Mapping[Point, Score], ladder: Sequence[float]) -> Point | None:
    """The next point to try where the best learning rate so far is the lowest or the highest; None where it is inside.

    Args:
        means: Mean scores of the points tried.
        ladder: Learning rates that the grid may grow to.
    """
    if not means:
        return None
    best = min(means, key=lambda point: _order(point, means[point]))
    lr, tried = best.get("lr"), [point.get("lr") for point in means]
    if lr == min(tried):
        following = max((rate for rate in ladder if rate < 0.99 * lr), default=None)
    elif lr == max(tried):
        following = min((rate for rate in ladder if rate > 1.01 * lr), default=None)
    else:
        following = None
    return None if following is None else best.replace(lr=following)


def _mean(scores: Sequence[Score]) -> Score:
    # fsum: the mean must not depend on the order in which runs came in
    return tuple(
        math.fsum(column) / len(column) if all(map(math.isfinite, column)) else math.inf
        for column in zip(*scores, strict=True)
    )


def _order(point: Point, score: Score) -> tuple[float, ...]:
    # float means of equal scores in another order are equal to the last bits, not always to the last
    rounded = (round(number, 12) for number in score)
    return (*rounded, *(point.get(name) or 0 for name in ("rank", "rho", "lr")))
