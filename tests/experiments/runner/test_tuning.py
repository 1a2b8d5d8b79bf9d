from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import pytest

from experiments.runner.cells import Cell
from experiments.runner.jobs import Job, Point
from experiments.runner.run_folder import Work
from experiments.runner.schedule import Schedule
from experiments.runner.settings import Role, option
from experiments.runner.tuning import beyond, choose, mean_scores


def point(lr: float, rank: int | None = None, rho: float | None = None) -> Point:
    return Point.of(lr=lr, rank=rank, rho=rho)


def test_points_are_values_by_name() -> None:
    one = Point.of(lr=1e-3, rank=4, rho=None)
    assert str(one) == "lr 0.001, rank 4"
    assert (one.get("lr"), one.get("rho"), one.get("rho", 2.0)) == (1e-3, None, 2.0)
    assert one.replace(lr=0.5) == Point.of(lr=0.5, rank=4)
    assert one.as_dict() == {"lr": 1e-3, "rank": 4}
    assert len({one, Point.of(lr=0.001, rank=4)}) == 1


def test_the_least_mean_over_runs_is_chosen() -> None:
    found = choose({point(1e-3): [(1.0,), (3.0,)], point(1e-2): [(0.5,), (3.4,)]}, 2)
    assert found is not None
    assert found.point == point(1e-2)
    assert found.score == pytest.approx((1.95,))
    assert found.candidates[point(1e-3)] == (2.0,)


def test_ties_go_by_the_second_number_then_rank_rho_and_rate() -> None:
    scores = {
        point(1e-2, 4, 2.0): [(-0.5, 1.0)],
        point(1e-3, 4, 2.0): [(-0.5, 1.0)],
        point(1e-3, 2, 2.0): [(-0.5, 1.0)],
        point(1e-2, 2, 1.0): [(-0.5, 1.0)],
        point(1e-2, 8, 1.0): [(-0.5, 1.1)],
        point(1e-4, 1, 1.0): [(-0.4, 0.1)],
    }
    order = [point(1e-2, 2, 1.0), point(1e-3, 2, 2.0), point(1e-3, 4, 2.0), point(1e-2, 4, 2.0), point(1e-2, 8, 1.0)]
    for best in order:
        found = choose(scores)
        assert found is not None
        assert found.point == best
        del scores[best]


def test_the_mean_does_not_depend_on_the_order_of_runs() -> None:
    accuracies = [(0.1,), (0.2,), (0.3,), (0.7,)]
    assert len({mean_scores({point(1): list(order)}, 4)[point(1)] for order in permutations(accuracies)}) == 1
    # equal accuracies that floats add up differently are a tie: the smaller rank counts
    found = choose({point(1, 4): [(-0.1,), (-0.7,)], point(1, 2): [(-0.3,), (-0.5,)]}, 2)
    assert found is not None
    assert found.point == point(1, 2)


def test_a_number_that_is_not_finite_is_the_worst() -> None:
    found = choose({point(1): [(1.0,), (math.nan,)], point(2): [(5.0,), (9.0,)]}, 2)
    assert found is not None
    assert found.point == point(2)
    assert found.candidates[point(1)] == (math.inf,)
    # an accuracy counts though the loss beside it is none
    found = choose({point(1): [(-0.9, math.nan)], point(2): [(-0.8, 0.1)]})
    assert found is not None
    assert found.point == point(1)
    assert choose({point(1): [(math.nan,)], point(2): [(math.inf,)]}) is None


def test_points_without_all_their_runs_are_not_chosen() -> None:
    found = choose({point(1): [(0.0,)], point(2): [(5.0,), (9.0,)]}, 2)
    assert found is not None
    assert found.point == point(2)
    assert choose({point(1): [(0.0,)], point(2): []}, 2) is None
    assert choose({}) is None


def test_the_grid_grows_beyond_the_edge_that_is_best() -> None:
    ladder = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    means = {point(1e-4, 2): (3.0,), point(1e-3, 2): (2.0,), point(1e-2, 2): (1.0,)}
    assert beyond(means, ladder) == point(1e-1, 2)
    assert beyond({**means, point(1e-4, 2): (0.5,)}, ladder) == point(1e-5, 2)
    assert beyond({**means, point(1e-3, 2): (0.5,)}, ladder) is None
    assert beyond(means, ()) is None
    assert beyond(means, (1e-2 * 1.005,)) is None  # as good as equal
    assert beyond({}, ladder) is None


def test_a_run_that_diverged_is_the_worst_whatever_its_accuracy(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Settings:
        lr: float = option(1.0, "learning rate", Role.RESULT)

    def tune(point: Point) -> list[Job]:
        return [Job(never, Settings(point.get("lr")), str(tmp_path), "tune", {}, str(point))]

    points = [Point.of(lr=1.0), Point.of(lr=0.1)]
    for point, metrics in zip(points, ({"accuracy": 0.5, "diverged": "at step 1"}, {"accuracy": 0.1}), strict=True):
        (job,) = tune(point)
        job.folder.start()
        job.folder.finish(metrics)
    schedule = Schedule([Cell("one", points, tune, lambda point: [])], lambda metrics: (-metrics["accuracy"],))
    assert schedule.choices()["one"].point == points[1]
    assert schedule.choices()["one"].candidates[points[0]] == (math.inf,)


def never(job: Job) -> Work:
    raise AssertionError
