"""Comparisons by epoch agree with scipy and say what the intervals say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.report import learning_rates as rates
from experiments.report.epochs import compare, paired_differences, shown_epochs, verdict
from experiments.runner.statistics import Interval


def _run(method: str, seed: int, loss: list[float]) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "lr": 0.01, "loss": loss, "accuracy": [1 - value for value in loss],
        "trainable_parameters": 100, "setup_seconds": 0.1,
    }  # fmt: skip


def _runs(**losses: list[list[float]]) -> pd.DataFrame:
    names = {"lora": "lora", "eva_1": "eva:1"}
    return pd.DataFrame([_run(names[m], seed, loss) for m, rows in losses.items() for seed, loss in enumerate(rows)])


LOSSES = {"lora": [[1.0, 0.6], [1.2, 0.5], [0.9, 0.7]], "eva_1": [[0.81, 0.6], [1.0, 0.6], [0.69, 0.7]]}


def test_tables_agree_with_scipy() -> None:
    comparison = compare(_runs(**LOSSES))
    t = stats.t.ppf(0.975, 2)
    for label, name in (("LoRA", "lora"), ("EVA (ρ = 1)", "eva_1")):
        column = [row[0] for row in LOSSES[name]]
        cell = comparison.results.cells.loc[label, "Epoch 1"]
        assert cell.startswith(f"{np.mean(column):.3f} ± {t * stats.sem(column):.3f}")
        assert ("*" in cell) == (name == "eva_1")
    (difference,) = paired_differences(_runs(**LOSSES))
    gaps = np.array(LOSSES["eva_1"])[:, 0] - np.array(LOSSES["lora"])[:, 0]
    expected = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (difference.loss[1].low, difference.loss[1].high) == pytest.approx((expected.low, expected.high))
    assert difference.accuracy[1].mean == pytest.approx(-100 * gaps.mean())
    assert difference.wins == {1: 3, 2: 0}


def test_a_clear_difference_is_one_whose_interval_excludes_zero() -> None:
    comparison = compare(_runs(**LOSSES))
    (sentence,) = comparison.verdicts
    assert "EVA (ρ = 1) against LoRA" in sentence
    assert "3 paired seeds: ahead after epoch 1; no clear difference after epoch 2." in sentence
    # two standard errors would call it clear, the interval of three runs does not
    gaps = [-0.1, -0.2, -0.5]
    assert abs(np.mean(gaps)) > 2 * stats.sem(gaps)
    assert verdict(Interval.of(gaps)) == "no clear difference"
    assert verdict(Interval.of([0.1, 0.11, 0.12])) == "behind"


def test_pairs_use_common_seeds_only_and_one_seed_decides_nothing() -> None:
    runs = pd.DataFrame([_run("lora", 0, [1.0]), _run("lora", 1, [9.0]), _run("eva", 0, [0.5])])
    (difference,) = paired_differences(runs)
    assert difference.seeds == 1
    assert difference.loss[1].mean == pytest.approx(-0.5)
    assert "undecided (one seed) after epoch 1" in difference.sentence
    assert paired_differences(runs[2:]) == []
    assert compare(runs[2:]).differences is None


def test_shown_epochs_are_the_first_three_and_the_last() -> None:
    shown = [shown_epochs(range(1, n + 1)) for n in (1, 2, 3, 4, 10)]
    assert shown == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 10]]
    assert shown_epochs([1, 2, 5]) == [1, 2, 5]


def test_evaluations_after_some_epochs_stand_under_those_epochs_and_frozen_features_under_the_last() -> None:
    runs = _runs(lora=[[1.0, 0.6], [1.2, 0.5]], eva_1=[[0.8, 0.5], [1.0, 0.45]]).assign(epochs=[[1, 5]] * 4)
    frozen = {**_run("linear", 0, [0.9]), "epochs": [5], "setup_seconds": float("nan")}
    table = compare(pd.concat([runs, pd.DataFrame([frozen])], ignore_index=True)).results
    assert list(table.cells.columns) == ["Rate", "Trained", "Set-up", "Epoch 1", "Epoch 5"]
    assert table.cells.loc["Linear", ["Rate", "Set-up", "Epoch 1"]].tolist() == ["–", "–", "–"]
    assert table.cells.loc["Linear", "Epoch 5"] == "0.900\n10.0 %"
    assert table.cells.loc["LoRA", "Epoch 5"].startswith("0.550 ±")
    assert any("frozen features" in note for note in table.notes)


def test_pairs_that_are_asked_for_are_compared() -> None:
    (difference,) = paired_differences(_runs(**LOSSES), [("lora", "eva:1")])
    (usual,) = paired_differences(_runs(**LOSSES))
    assert {epoch: -it.mean for epoch, it in difference.loss.items()} == pytest.approx(
        {epoch: it.mean for epoch, it in usual.loss.items()}
    )
    assert "LoRA against EVA (ρ = 1)" in difference.sentence


def test_equal_rates_are_counted_where_both_methods_have_them() -> None:
    def rows(method: str, *losses: float) -> list[dict[str, Any]]:
        return [
            {"method": method, "lr": 10.0**-i, "early_loss": loss, "loss": 2 * loss} for i, loss in enumerate(losses)
        ]

    scores = pd.DataFrame([*rows("lora", 0.5, 0.6, 0.7), *rows("eva", 0.4, 0.6)])
    columns = {"early_loss": "after epoch 3", "loss": "after epoch 10"}
    (sentence,) = rates.equal_rate_sentences(scores, columns)
    assert "EVA has a lower mean loss than LoRA at 1 of 2 rates after epoch 3 and at 1 of 2 rates after" in sentence
    assert rates.equal_rate_sentences(rates.scores_of(None), columns) == []


def test_a_run_that_diverged_is_neither_the_best_nor_without_a_difference() -> None:
    comparison = compare(_runs(lora=[[1.0, 0.6], [1.2, 0.5]], eva_1=[[0.8, float("nan")], [1.0, 0.4]]))
    table = comparison.results.cells
    assert table.loc["EVA (ρ = 1)", "Epoch 2"].startswith("not finite")
    assert table.loc["LoRA", "Epoch 2"].split("\n")[0].endswith("*")
    assert comparison.verdicts[0].endswith("after epoch 1; undecided (a run diverged) after epoch 2.")
    assert comparison.headline.index("LoRA 0.550") < comparison.headline.index("EVA (ρ = 1) not finite")
    assert verdict(Interval.of([float("inf"), 1.0])) == "undecided (a run diverged)"
