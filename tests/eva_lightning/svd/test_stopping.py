"""Stopping rules: the doubling rule and the paper's cosine rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from eva_lightning.svd import (
    CosineRule,
    DoublingRule,
    ExactSVD,
    IncrementalSVD,
    Solution,
    StreamingSVD,
    make_stopping_rule,
    stopping,
)
from eva_lightning.svd.stopping import smallest_cosine
from tests.svd_helpers import captured_variance, decaying, digits


def test_doubling_rule_compares_with_half_the_minibatches() -> None:
    x = decaying(3200, 64)
    rule, engine = DoublingRule(0.99), ExactSVD(64, 8)
    for t, batch in enumerate(x.split(100), 1):
        engine.update(batch)
        if rule.due(t):
            rule.check(t, {"layer": engine})
    looks = [t for t, _ in rule.history["layer"]]
    assert [t for t in looks if t & (t - 1) == 0] == [4, 8, 16, 32]
    assert set(looks) & {6, 12, 24}
    for t, value in rule.history["layer"]:
        noted = 1 << ((t - 1).bit_length() - 1)
        early = ExactSVD(64, 8)
        early.update(x[: noted * 100])
        missed = 1 - captured_variance(x[: t * 100], early.result().components)
        assert value == pytest.approx(1 - missed * noted / (t - noted), abs=1e-4)


def test_doubling_rule_looks_half_way_where_the_last_layer_should_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def missed(s: int, t: int) -> float:
        return 0.24 * (1 / s - 1 / t)  # a shuffled stream: 1 - q(t) = 0.24 / t reaches 0.01 at t = 24

    script: list[dict[str, float]] = [{}]
    monkeypatch.setattr(
        stopping, "solve", lambda *_, **__: Solution({"x": SimpleNamespace(components=None)}, script[-1])
    )
    rule = DoublingRule(0.99)
    looks, converged = [], False
    for t in range(2, 65):
        if converged or not rule.due(t):
            continue
        if looks:
            script.append({"x": 1 - missed(1 << ((t - 1).bit_length() - 1), t)})
        converged = rule.check(t, {})["x"]
        looks.append(t)
    assert looks == [2, 4, 8, 16, 24]
    assert rule.history["x"][-1] == (24, pytest.approx(0.99))


def test_doubling_rule_wants_two_quiet_doublings_and_enough_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(values: list[float], **options: int) -> list[bool]:
        script = iter([{}, *({"x": value} for value in values)])
        monkeypatch.setattr(
            stopping, "solve", lambda *_, **__: Solution({"x": SimpleNamespace(components=None)}, next(script))
        )
        rule = DoublingRule(0.99, **options)
        return [rule.check(2**i, {})["x"] for i in range(1, len(values) + 2)][1:]

    # at 4, 8, 16, 32 minibatches; 1 - q halves with every doubling of a shuffled stream
    assert verdicts([0.96, 0.979, 0.9895, 0.9948]) == [False, False, False, True]
    assert verdicts([0.98, 0.991]) == [False, True]
    assert verdicts([0.995, 0.996]) == [False, True]
    assert verdicts([0.90, 0.992, 0.93, 0.991, 0.992]) == [False, False, False, False, True]
    assert verdicts([0.995, 0.996, 0.996], min_batches=16) == [False, False, True]


def test_doubling_rule_converges_on_a_stationary_stream_and_not_on_a_moving_one() -> None:
    steady, moving = ExactSVD(64, 4), ExactSVD(64, 4)
    rule = DoublingRule(0.99)
    x = decaying(1600, 64)
    for t in range(1, 9):
        steady.update(x[(t - 1) * 200 : t * 200])
        shifted = torch.zeros(50, 64)
        shifted[:, t * 4 : t * 4 + 4] = torch.randn(50, 4, generator=torch.Generator().manual_seed(t)) * 3.0**t
        moving.update(shifted)
        if rule.due(t):
            converged = rule.check(t, {"steady": steady, "moving": moving})
    assert converged == {"steady": True, "moving": False}


def test_a_layer_without_variance_is_converged_and_one_without_tokens_does_not_vote() -> None:
    dead, silent = ExactSVD(16, 4), ExactSVD(16, 4)
    engines: dict[str, StreamingSVD] = {"dead": dead, "silent": silent}
    for rule in (DoublingRule(min_batches=2), CosineRule()):
        for t in (1, 2, 4):
            dead.update(torch.zeros(10, 16))
            converged = rule.check(t, engines)
        assert converged == {"dead": True}
        assert "silent" not in rule.history


def test_a_layer_that_missed_the_first_minibatches_starts_when_it_comes() -> None:
    x = decaying(400, 16)
    for rule, needed in ((DoublingRule(0.5, min_batches=2), 3), (CosineRule(0.5), 2)):
        late = ExactSVD(16, 2)
        assert rule.check(1, {"late": late}) == {}
        for seen, batch in enumerate(x.split(100), 1):
            late.update(batch)
            assert rule.check(2**seen, {"late": late}) == {"late": seen >= needed}


class _Flipping(IncrementalSVD):
    """The same decomposition with the opposite sign at every look."""

    flipped = False

    def result(self):  # type: ignore[no-untyped-def]
        self.flipped = not self.flipped
        found = super().result()
        return type(found)(**{**vars(found), "components": found.components * (-1 if self.flipped else 1)})


def test_cosine_rule_ignores_signs() -> None:
    engine = _Flipping(64, 4)
    engine.update(decaying(200, 64))
    rule = CosineRule(0.99)
    rule.check(1, {"layer": engine})
    assert rule.check(2, {"layer": engine}) == {"layer": True}
    assert rule.history["layer"] == [(2, pytest.approx(1.0, abs=1e-5))]


def test_cosine_rule_asks_every_component_at_every_update() -> None:
    x, _ = digits()
    engine, rule, values = IncrementalSVD(64, 8), CosineRule(0.99), []
    for t, batch in enumerate(x.split(60), 1):
        before = engine.result().components if t > 1 else None
        engine.update(batch)
        assert rule.due(t)
        converged = rule.check(t, {"layer": engine})
        if before is not None:
            cosines = (before * engine.result().components).sum(1).abs()
            values.append(float(cosines.min()))
            assert converged["layer"] == bool((cosines >= 0.99).all())
    assert [value for _, value in rule.history["layer"]] == pytest.approx(values)


def test_directions_without_variance_do_not_count() -> None:
    engine = IncrementalSVD(32, 4)
    engine.update(decaying(3, 32))
    result = engine.result()
    scrambled = result.components.clone()
    scrambled[2:] = scrambled[2:].flip(0)
    assert smallest_cosine(scrambled, result) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.01, float("nan")])
def test_tau_must_be_a_share(tau: float) -> None:
    for name in ("captured", "cosine"):
        with pytest.raises(ValueError, match="tau must be a number above 0 and of at most 1, got"):
            make_stopping_rule(name, tau)


def test_rules_by_name() -> None:
    assert isinstance(make_stopping_rule("captured", 0.9), DoublingRule)
    assert isinstance(make_stopping_rule("cosine", 0.9), CosineRule)
    assert not any(make_stopping_rule("never").due(n) for n in range(1, 65))
    with pytest.raises(ValueError, match="unknown stopping 'cosin': did you mean cosine"):
        make_stopping_rule("cosin", 0.9)
