"""Scores and the redistribution of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eva_lightning.ranks import METRICS, explained_variance, redistribute_ranks

SIGMA = torch.tensor([4.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ratio", [16 / 42, 4 / 42, 1 / 42]),
        ("eq6", [16 / (9 * 7), 4 / (9 * 7), 1 / (9 * 7)]),
        ("sum", [16 / 21, 4 / 21, 1 / 21]),
        ("max", [1.0, 0.25, 1 / 16]),
        ("raw", [16 / 9, 4 / 9, 1 / 9]),
    ],
)
def test_metrics_by_hand(metric: str, expected: list[float]) -> None:
    scores = explained_variance(SIGMA, total_variance=42.0, n_samples=10, metric=metric)
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "power"), [("ratio", 0), ("sum", 0), ("max", 0), ("eq6", 1), ("raw", 2)])
def test_how_scores_grow_with_the_scale_of_the_inputs(metric: str, power: int) -> None:
    """Equation 6 of the paper, taken literally, is not scale-invariant: it grows linearly with the inputs."""
    scale = 10.0
    before = explained_variance(SIGMA, 42.0, 10, metric)
    after = explained_variance(SIGMA * scale, 42.0 * scale**2, 10, metric)
    assert torch.allclose(after, before * scale**power)


def test_equation_6_hands_ranks_to_the_layer_with_large_activations_and_the_ratio_does_not() -> None:
    flat, steep, scale = torch.tensor([3.0, 2.9, 2.8]), torch.tensor([5.0, 0.2, 0.1]), 1000.0

    def ranks(metric: str, scale: float) -> dict[str, int]:
        sigma = {"flat": flat, "steep": steep * scale}
        return redistribute_ranks(
            {layer: explained_variance(s, float(s.square().sum()), 100, metric) for layer, s in sigma.items()}, budget=3
        )

    assert ranks("ratio", 1.0) == ranks("ratio", scale) == {"flat": 2, "steep": 1}
    assert ranks("eq6", scale) != ranks("eq6", 1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_no_variance_scores_zero_and_never_nan(metric: str) -> None:
    assert explained_variance(torch.zeros(3), 0.0, 10, metric).tolist() == [0, 0, 0]
    assert explained_variance(torch.zeros(3), 0.0, 1, metric).tolist() == [0, 0, 0]


def test_unknown_metric() -> None:
    with pytest.raises(ValueError, match="unknown metric 'ration': did you mean ratio"):
        explained_variance(SIGMA, 42.0, 10, "ration")


def test_keeps_the_largest_scores_over_all_layers() -> None:
    scores = {"a": torch.tensor([0.9, 0.05, 0.01]), "b": torch.tensor([0.5, 0.3, 0.1]), "c": torch.tensor([0.2, 0.06])}
    assert redistribute_ranks(scores, 5) == {"a": 1, "b": 3, "c": 1}


def test_an_all_zero_layer_gets_no_rank() -> None:
    scores = {"dead": torch.zeros(4), "alive": torch.tensor([0.5, 0.1, 0.0, 0.0])}
    assert redistribute_ranks(scores, 3) == {"dead": 0, "alive": 3}
    assert redistribute_ranks(scores, 8) == {"dead": 0, "alive": 4}


def test_ties_go_by_component_and_then_by_layer() -> None:
    scores = {layer: torch.full((4,), 0.25) for layer in "cab"}
    assert redistribute_ranks(scores, 7) == {"c": 3, "a": 2, "b": 2}


def test_caps_for_all_layers_or_per_layer() -> None:
    scores = {"a": torch.tensor([0.9, 0.8, 0.7]), "b": torch.tensor([0.3, 0.2, 0.1])}
    assert redistribute_ranks(scores, 4, max_rank=2) == {"a": 2, "b": 2}
    assert redistribute_ranks(scores, 4, max_rank={"a": 1, "b": 5}) == {"a": 1, "b": 3}


def test_nothing_to_hand_out() -> None:
    assert redistribute_ranks({}, 4) == {}
    assert redistribute_ranks({"a": torch.ones(3)}, 0) == {"a": 0}


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_scores_must_be_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(ValueError, match="layer 'a'"):
        redistribute_ranks({"a": torch.tensor([0.5, bad])}, 1)


def test_negative_budgets_and_caps() -> None:
    with pytest.raises(ValueError, match="-1"):
        redistribute_ranks({"a": torch.ones(2)}, -1)
    with pytest.raises(ValueError, match="-2"):
        redistribute_ranks({"a": torch.ones(2)}, 1, max_rank=-2)


_score = st.one_of(st.just(0.0), st.just(0.125), st.floats(1e-6, 1.0))
_layer = st.lists(_score, min_size=1, max_size=8).map(lambda values: sorted(values, reverse=True))
_layers = st.lists(_layer, min_size=1, max_size=6).map(
    lambda lists: {f"layer{i}": torch.tensor(values, dtype=torch.float64) for i, values in enumerate(lists)}
)


def _capacity(scores: dict[str, Tensor], cap: int) -> int:
    return sum(min(len(values), cap) for values in scores.values() if values.any())


@settings(max_examples=200, deadline=None)
@given(scores=_layers, budget=st.integers(0, 60), cap=st.integers(0, 9))
def test_budget_is_exact_and_caps_hold(scores: dict[str, Tensor], budget: int, cap: int) -> None:
    ranks = redistribute_ranks(scores, budget, cap)
    assert list(ranks) == list(scores)
    assert sum(ranks.values()) == min(budget, _capacity(scores, cap))
    for layer, rank in ranks.items():
        assert 0 <= rank <= min(cap, len(scores[layer]))
        if not scores[layer].any():
            assert rank == 0


@settings(max_examples=200, deadline=None)
@given(scores=_layers, budget=st.integers(0, 60))
def test_nothing_left_out_is_larger_than_what_was_kept(scores: dict[str, Tensor], budget: int) -> None:
    ranks = redistribute_ranks(scores, budget)
    kept = [float(v) for layer, values in scores.items() for v in values[: ranks[layer]]]
    left = [float(v) for layer, values in scores.items() if values.any() for v in values[ranks[layer] :]]
    if kept and left:
        assert min(kept) >= max(left)


@settings(max_examples=100, deadline=None)
@given(scores=_layers, budget=st.integers(0, 60))
def test_is_deterministic_and_grows_with_the_budget(scores: dict[str, Tensor], budget: int) -> None:
    ranks, more = redistribute_ranks(scores, budget), redistribute_ranks(scores, budget + 1)
    assert ranks == redistribute_ranks(scores, budget)
    assert all(more[layer] >= rank for layer, rank in ranks.items())
    # Doubling is exact in floating point, so that ties stay ties.
    assert ranks == redistribute_ranks({layer: 2 * values for layer, values in scores.items()}, budget)


@settings(max_examples=100, deadline=None)
@given(
    r=st.integers(1, 6), values=st.lists(st.lists(st.floats(0.1, 10), min_size=6, max_size=6), min_size=1, max_size=5)
)
def test_rho_1_is_uniform(r: int, values: list[list[float]]) -> None:
    scores = {f"layer{i}": torch.tensor(sorted(v, reverse=True))[:r] for i, v in enumerate(values)}
    assert set(redistribute_ranks(scores, r * len(scores)).values()) == {r}


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(0.1, 10), min_size=4, max_size=4), min_size=2, max_size=5),
    exponents=st.lists(st.integers(-8, 8), min_size=5, max_size=5),
    budget=st.integers(1, 12),
)
def test_the_ratio_does_not_see_the_scale_of_a_layer(
    values: list[list[float]], exponents: list[int], budget: int
) -> None:
    def ranks(scaled: bool) -> dict[str, int]:
        scores = {}
        for i, (row, exponent) in enumerate(zip(values, exponents, strict=False)):
            sigma = torch.tensor(sorted(row, reverse=True), dtype=torch.float64) * (2.0**exponent if scaled else 1.0)
            scores[str(i)] = explained_variance(sigma, float(sigma.square().sum()) * 1.5, 50, "ratio")
        return redistribute_ranks(scores, budget)

    assert ranks(scaled=True) == ranks(scaled=False)
