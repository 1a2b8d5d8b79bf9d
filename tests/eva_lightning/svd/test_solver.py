"""Solving many layers together gives what each engine gives alone, and rough solves are as good as they claim."""

from __future__ import annotations

import pytest
import torch

from eva_lightning.svd import DoublingRule, ExactSVD, StreamingSVD, make_engine, solve
from tests.svd_helpers import captured_variance, decaying, digits, feed

WIDTHS = {"a": 320, "b": 320, "c": 320, "narrow": 48, "wide": 1100}


def _engines(name: str = "exact", seed: int = 0) -> dict[str, StreamingSVD]:
    return {
        layer: feed(make_engine(name, dim, 16), decaying(900, dim, seed=seed + i).split(300))
        for i, (layer, dim) in enumerate(WIDTHS.items())
    }


@pytest.mark.parametrize("name", ["exact", "incremental", "sketch"])
def test_together_is_as_alone(name: str) -> None:
    alone = {layer: engine.result() for layer, engine in _engines(name).items()}
    together = solve(_engines(name)).results
    assert list(together) == list(WIDTHS)
    for i, (layer, dim) in enumerate(WIDTHS.items()):
        assert torch.allclose(together[layer].singular_values, alone[layer].singular_values, rtol=1e-4)
        assert together[layer].total_variance == alone[layer].total_variance
        assert torch.equal(together[layer].mean, alone[layer].mean)
        if name == "exact":
            assert captured_variance(decaying(900, dim, seed=i), together[layer].components) >= 1 - 1e-6


@pytest.mark.parametrize("name", ["exact", "sketch"])
def test_tells_what_given_components_capture(name: str) -> None:
    engines = _engines(name)
    given = {layer: engine.result().components for layer, engine in _engines(name, seed=50).items() if layer != "b"}
    for tolerance in (1e-6, 1e-3):
        captured = solve(engines, given, tolerance=tolerance).captured
        assert captured.keys() == given.keys()
        for layer, value in captured.items():
            assert value == pytest.approx(engines[layer].captured(given[layer]), abs=max(tolerance, 1e-5))


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("start", ["cold", "unrelated", "half"])
def test_a_rough_solve_misses_no_more_than_it_may(power: float, start: str) -> None:
    x = decaying(3000, 400, power=power)
    given = {
        "cold": {},
        "unrelated": {"x": torch.eye(400)[:16]},
        "half": {"x": feed(ExactSVD(400, 16), [x[:1500]]).result().components},
    }[start]
    rough = solve({"x": feed(ExactSVD(400, 16), [x])}, given, tolerance=1e-3).results["x"]
    # Flat spectra have no gap to extrapolate from: five times the tolerance there.
    assert captured_variance(x, rough.components) >= 1 - (5e-3 if power < 1 else 1e-3)


def test_layers_without_tokens_are_left_out_and_constant_ones_are_not() -> None:
    engines = {"dead": feed(ExactSVD(200, 4), [torch.ones(9, 200)]), "silent": ExactSVD(200, 4), **_engines()}
    solution = solve(engines, {"dead": torch.eye(200)[:4]})
    assert "silent" not in solution.results
    assert solution.captured == {"dead": 1.0}
    assert solution.results["dead"].total_variance == 0.0
    assert solve({}).results == {}


def test_a_rough_look_does_not_spoil_the_final_result() -> None:
    looked, unseen = _engines(), _engines()
    solve(looked, tolerance=1e-2)
    for layer, result in solve(looked).results.items():
        assert torch.allclose(result.singular_values, solve(unseen).results[layer].singular_values, rtol=1e-4)


def test_repeats_are_identical_to_the_bit() -> None:
    one, two = (_watched() for _ in range(2))
    assert one.keys() == two.keys()
    for layer, components in one.items():
        assert torch.equal(components, two[layer])


def _watched() -> dict[str, torch.Tensor]:
    """Components after a stream with checks in between."""
    kinds = {"a": "exact", "b": "exact", "c": "sketch", "narrow": "exact", "wide": "sketch"}
    engines = {layer: make_engine(kinds[layer], dim, 16) for layer, dim in WIDTHS.items()}
    rule = DoublingRule()
    for t in range(1, 9):
        for i, engine in enumerate(engines.values()):
            engine.update(decaying(100, engine.dim, seed=10 * t + i))
        if rule.due(t):
            rule.check(t, engines)
    return {layer: result.components for layer, result in solve(engines).results.items()}


def _stop(x: torch.Tensor, batch: int, k: int, tau: float) -> tuple[int, int, float]:
    """Minibatches until ``q >= tau`` for the first time, and until the rule stops; how much of everything is captured
    then.
    """
    engine, rule = ExactSVD(x.shape[1], k), DoublingRule(tau)
    for t, rows in enumerate(x.split(batch), 1):
        engine.update(rows)
        if rule.due(t) and rule.check(t, {"x": engine})["x"]:
            break
    first = next((n for n, value in rule.history["x"] if value >= tau), t)
    return first, t, captured_variance(x, engine.result().components)


@pytest.mark.parametrize("tau", [0.98, 0.99])
@pytest.mark.parametrize("k", [8, 32])
@pytest.mark.parametrize("batch", [16, 32, 64])
def test_a_class_sorted_stream_is_seen_as_a_whole(batch: int, k: int, tau: float) -> None:
    x, y = digits()
    _, t, whole = _stop(x[y.argsort(stable=True)], batch, k, tau)
    assert whole >= tau
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    first_shuffled, t_shuffled, whole_shuffled = _stop(shuffled, batch, k, tau)
    assert t_shuffled == max(first_shuffled, 8)  # the second condition costs nothing when it is not needed
    assert t_shuffled <= t
    assert whole_shuffled >= tau - 0.015


@pytest.mark.parametrize(("k", "batch", "tau", "without"), [(32, 32, 0.98, 0.95), (32, 64, 0.98, 0.95)])
def test_one_quiet_doubling_of_a_class_sorted_stream_is_not_believed(
    k: int, batch: int, tau: float, without: float
) -> None:
    x, y = digits()
    x = x[y.argsort(stable=True)]
    first, t, whole = _stop(x, batch, k, tau)
    early = feed(ExactSVD(64, k), x[: first * batch].split(batch)).result().components
    assert captured_variance(x, early) < without
    assert t > first
    assert whole >= 0.99
