from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.runner.statistics import Interval, Sample, mean_difference, mean_over, t_quantile, weighted_sum


def limits(interval: Interval) -> tuple[float, float]:
    assert interval.half is not None
    return interval.mean - interval.half, interval.mean + interval.half


def test_intervals_are_those_of_students_distribution() -> None:
    # by hand: mean 3, standard deviation sqrt(2.5), t(4) = 2.7764
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.n) == (3.0, 5)
    assert found.half == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)
    assert found.excludes_zero
    assert found.text(2) == "3.00 ± 1.96"
    assert Interval.of([0.5]).text(1, sign=True) == "+0.5"
    for degrees in (1, 4, 7.3, 60, math.inf):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees))
    with pytest.raises(ValueError, match="degrees of freedom must be a number above 0, got 0"):
        t_quantile(0)


def test_one_pair_is_welchs_interval() -> None:
    a, b = [71.0, 74.5, 73.0, 70.2, 75.1], [69.0, 69.3, 68.0]
    found = mean_difference([Sample.of(a)], [Sample.of(b)])
    assert limits(found) == pytest.approx(tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)))
    assert found.n == 3


def test_a_single_sample_is_students_interval() -> None:
    values = [0.2, 0.5, 0.9, 0.4]
    assert limits(mean_over([Sample.of(values)])) == pytest.approx(limits(Interval.of(values)))


def test_mean_of_differences_covers_the_truth_as_often_as_it_says() -> None:
    """Three tasks of very different spread, 5 and 3 seeds: 95 of 100 intervals hold the true mean difference."""
    generator = np.random.default_rng(0)
    spreads, truth = (0.1, 2.0, 30.0), 1.5
    inside = 0
    for _ in range(2000):
        first = [Sample.of(list(truth + s * generator.standard_normal(5))) for s in spreads]
        second = [Sample.of(list(s * generator.standard_normal(3))) for s in spreads]
        low, high = limits(mean_difference(first, second))
        inside += low <= truth <= high
    assert 0.94 <= inside / 2000 <= 0.985


def test_rounding_widens_and_a_missing_deviation_leaves_no_width() -> None:
    exact = Sample(70.0, 0.4, 5)
    rounded = Sample(70.0, 0.4, 5, resolution=0.1)
    wide, narrow = mean_over([rounded]).half, mean_over([exact]).half
    assert wide is not None
    assert narrow is not None
    assert narrow < wide < 1.02 * narrow
    # a printed deviation of 0.0 leaves the rounding error of the mean
    assert mean_over([Sample(99.7, 0.0, 5, resolution=0.1)]).half == pytest.approx(1.959964 * 0.1 / 12**0.5)
    assert mean_over([Sample(1.0, 0.0, 5)]) == Interval(1.0, 0.0, 5)
    assert mean_difference([exact], [Sample.of([69.0])]) == Interval(1.0, None, 1)
    assert weighted_sum([(2.0, exact), (1.0, Sample.of([1.0]))]).mean == 141.0
