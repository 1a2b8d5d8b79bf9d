from __future__ import annotations

import math
import statistics

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.runner.statistics import (
    Interval,
    Sample,
    by_task,
    holm,
    iqm,
    mean_difference,
    mean_over,
    mean_ranks,
    over_seeds,
    over_tasks,
    paired,
    paired_by_task,
    t_quantile,
    t_test,
    weighted_sum,
)


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


def runs(seeds: int = 5) -> pd.DataFrame:
    """Two methods on tasks of different scale; b lacks a run."""
    generator = np.random.default_rng(1)
    rows = [
        {"method": method, "task": task, "seed": seed, "loss": scale * math.exp(0.1 * generator.standard_normal())}
        for method in ("lora", "eva")
        for task, scale in (("a", 1.0), ("b", 100.0))
        for seed in range(seeds)
    ]
    return pd.DataFrame([row for row in rows if (row["method"], row["task"], row["seed"]) != ("eva", "b", 3)])


def test_over_seeds_of_each_group() -> None:
    frame = runs()
    found = over_seeds(frame, "loss", ["task", "method"])
    assert list(found) == [("a", "lora"), ("b", "lora"), ("a", "eva"), ("b", "eva")]
    values = frame[(frame.task == "b") & (frame.method == "eva")].loss
    assert found["b", "eva"] == Interval.of(list(values))
    assert found["b", "eva"].n == 4
    assert over_seeds(frame, "loss")["eva"].mean == pytest.approx(frame[frame.method == "eva"].loss.mean())
    assert over_seeds(frame.iloc[:0], "loss") == {}


def test_over_tasks_only_seeds_with_all_tasks_count() -> None:
    frame = runs()
    found = over_tasks(frame, "loss")
    assert (found["lora"].n, found["eva"].n) == (5, 4)
    whole = frame[(frame.method == "eva") & (frame.seed != 3)]
    assert found["eva"].mean == pytest.approx(whole.loss.mean())
    assert over_tasks(frame[~((frame.method == "eva") & (frame.task == "b"))], "loss").keys() == {"lora"}


def test_pairs_are_differences_run_by_run() -> None:
    frame = runs()
    wide = frame.pivot(index="seed", columns=["method", "task"], values="loss").drop(index=3)
    by_hand = [
        statistics.fmean(wide["eva", task][seed] - wide["lora", task][seed] for task in "ab") for seed in wide.index
    ]
    found = paired(frame, "eva", "lora", "loss")
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(by_hand))
    reference = stats.ttest_1samp(by_hand, 0.0).confidence_interval(0.95)
    assert limits(found) == pytest.approx(tuple(reference))
    relative = paired(frame, "eva", "lora", "loss", relative=True)
    assert relative is not None
    logs = [100 * math.log(wide["eva", task][seed] / wide["lora", task][seed]) for task in "ab" for seed in wide.index]
    assert relative.mean == pytest.approx(statistics.fmean(logs))
    one_task = paired(frame[frame.task == "a"].drop(columns="task"), "eva", "lora", "loss")
    assert one_task is not None
    assert one_task.n == 5
    assert paired(frame, "eva", "dora", "loss") is None
    assert paired(frame[frame.seed == 3], "eva", "lora", "loss") is None
    assert paired(frame[frame.seed == 0], "eva", "lora", "loss") == Interval(pytest.approx(by_hand[0]), None, 1)


def test_interquartile_mean_and_its_bootstrap() -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((10, 4)) + np.arange(4)
    frame = pd.DataFrame(
        [{"method": "eva", "task": t, "seed": s, "score": scores[s, t]} for s in range(10) for t in range(4)]
    )
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    found = iqm(frame, "score")["eva"]
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002 - nobody's random numbers change
    assert found.mean == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    # resampled by hand: seeds within each task
    rows = generator.integers(10, size=(1_000, 10, 4))
    means = [stats.trim_mean(np.take_along_axis(scores, draw, axis=0).ravel(), 0.25) for draw in rows]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.03)
    assert found.n == 10
    assert iqm(frame, "score")["eva"] == found  # the same numbers every time
    assert found.text(2) == f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def test_ends_of_intervals() -> None:
    assert (Interval(0.5, 0.1, 3).low, Interval(0.5, None, 1).high) == (0.4, 0.5)


def _success(per_task: list[list[float]], method: str = "eva") -> list[dict[str, object]]:
    return [
        {"method": method, "task": str(task), "seed": seed, "success": value}
        for task, values in enumerate(per_task)
        for seed, value in enumerate(values)
    ]


def test_the_bootstrap_draws_seeds_within_tasks_not_over_all_runs() -> None:
    # no spread within a task: drawn within tasks nothing changes, drawn over all runs it does
    scores = [[0.1] * 3, [0.4] * 3, [0.6] * 3, [1.0] * 3]
    found = iqm(pd.DataFrame(_success(scores)), "success")["eva"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    drawn = np.random.default_rng(0).choice(np.ravel(scores), size=(1000, 12))
    low, high = np.quantile([stats.trim_mean(row, 0.25) for row in drawn], [0.025, 0.975])
    assert high - low > 0.2


def test_tasks_as_strata_and_differences_corrected_for_their_number() -> None:
    first, second = [[0.9, 0.7, 0.8], [0.3, 0.5, 0.1], [1.0] * 3], [[0.6, 0.7, 0.5], [0.2, 0.1, 0.1], [1.0] * 3]
    frame = pd.DataFrame([*_success(first), *_success(second, "lora")])
    differences = np.array(first) - np.array(second)  # (tasks, seeds)
    parts = differences.var(axis=1, ddof=1) / 3 / 3**2
    degrees = parts.sum() ** 2 / (parts**2 / 2).sum()
    for number in (1, 12):
        found = paired_by_task(frame, "eva", "lora", "success", comparisons=number)
        assert found is not None
        assert found.mean == pytest.approx(differences.mean())
        assert found.half == pytest.approx(stats.t.ppf(1 - 0.05 / number / 2, degrees) * math.sqrt(parts.sum()))
    # of one task it is the paired t test
    (one,) = (paired_by_task(frame[frame.task == "0"], "eva", "lora", "success"),)
    assert one is not None
    assert limits(one) == pytest.approx(tuple(stats.ttest_rel(first[0], second[0]).confidence_interval(0.95)))
    assert by_task(frame, "success")["eva"].mean == pytest.approx(np.mean(first))
    assert paired_by_task(frame[frame.method == "eva"], "eva", "lora", "success") is None
    assert paired_by_task(frame[(frame.method == "eva") | (frame.task == "0")], "eva", "lora", "success") is None


def test_p_values_are_scipys() -> None:
    values = [0.3, -0.1, 0.8, 0.4, 0.2]
    assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9)
    assert t_test([-v for v in values]) == pytest.approx(t_test(values))
    assert (t_test([0.5]), t_test([0.0, 0.0]), t_test([0.5, 0.5])) == (None, 1.0, 0.0)


def test_holms_correction_is_that_of_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

    p = {"a": 0.04, "b": 0.001, "c": 0.9, "d": 0.03, "e": 0.02, "f": 0.5}
    corrected = holm(p)
    assert list(corrected) == list(p)
    assert list(corrected.values()) == pytest.approx(list(multipletests(list(p.values()), method="holm")[1]))
    assert holm({}) == {}


def test_mean_ranks_are_scipys_with_ties_and_intervals_that_narrow_with_the_noise() -> None:
    generator = np.random.default_rng(1)
    means = {"a": [3.0, 2.0, 5.0], "b": [2.0, 2.0, 1.0], "c": [1.0, 4.0, 2.0]}
    exact = {method: [[mean] * 4 for mean in of] for method, of in means.items()}
    table = np.array(list(means.values()))
    expected = stats.rankdata(-table, axis=0).mean(axis=1)
    found = mean_ranks(exact)
    assert [found[m].mean for m in means] == pytest.approx(list(expected))
    assert all(r.low == r.mean == r.high for r in found.values())
    noisy = {m: [list(mean + generator.normal(0, 1, 4)) for mean in of] for m, of in means.items()}
    wide = mean_ranks(noisy)
    assert all(r.low <= r.mean <= r.high and r.low >= 1 and r.high <= 3 for r in wide.values())
    assert any(r.high - r.low > 0.3 for r in wide.values())
    assert sum(r.mean for r in wide.values()) == pytest.approx(6)
    assert mean_ranks(noisy) == wide
