"""The paper's stopping rule on components that get a rank: by hand-made decompositions whose cosines are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from eva_lightning.svd import IncrementalSVD, SelectedCosineRule, StreamingSVD, SVDResult
from tests.svd_helpers import decaying


class Scripted(IncrementalSVD):
    """An engine whose components turn by given angles: component j lies in the plane of axes 2j and 2j + 1."""

    def __init__(self, k: int = 3) -> None:
        super().__init__(2 * k, k)
        self.angles = torch.zeros(k)
        self.tokens = 0

    def turn(self, *degrees: float) -> None:
        """One more update, in which component j turns by ``degrees[j]``."""
        self.angles = self.angles + torch.tensor(degrees) * math.pi / 180
        self.tokens += 10

    @property
    def n_samples(self) -> int:
        return self.tokens

    def result(self) -> SVDResult:
        rows = torch.zeros(self.k, self.dim)
        for j, angle in enumerate(self.angles.tolist()):
            rows[j, 2 * j], rows[j, 2 * j + 1] = math.cos(angle), math.sin(angle)
        squares = torch.arange(self.k, 0, -1.0)
        return SVDResult.of(squares, rows, float(squares.sum()), torch.zeros(self.dim), self.tokens)


def rule(ranks: Mapping[str, Sequence[int]]) -> SelectedCosineRule:
    return SelectedCosineRule(0.99, lambda results: {layer: ranks[layer] for layer in results})


def test_only_components_that_get_a_rank_have_to_converge() -> None:
    ranks = {"a": [2], "b": [3], "none": [0]}
    engines: dict[str, Scripted] = {layer: Scripted() for layer in ranks}
    checks = rule(ranks)
    for engine in engines.values():
        engine.turn(0, 0, 0)
    # before there are two estimates nothing has converged but what gets no rank
    assert checks.check(1, engines) == {"a": False, "b": False, "none": True}
    assert checks.counts() == (0, 5)
    for engine in engines.values():
        engine.turn(2, 3, 80)  # cosines .9994, .9986, .1736
    converged = checks.check(2, engines)
    assert converged == {"a": True, "b": False, "none": True}
    assert checks.counts() == (4, 5)
    assert checks.share(converged) == pytest.approx(0.8)  # of components, not of layers
    for layer, degrees in (("a", 3), ("b", 80)):
        ((n, value),) = checks.history[layer]
        assert n == 2
        assert value == pytest.approx(math.cos(math.radians(degrees)), abs=1e-5)
    assert "none" not in checks.history or checks.history["none"][-1][1] == 1


def test_a_converged_layer_is_left_alone_until_it_gets_a_component_that_has_not() -> None:
    ranks = {"a": [1], "b": [3]}
    engines = {layer: Scripted() for layer in ranks}
    checks = rule(ranks)
    for n in (1, 2):
        for engine in engines.values():
            engine.turn(1, 60, 60)
        checks.check(n, engines)
    assert checks.paused == {"a"}
    engines["a"].turn(90, 90, 90)  # not looked at: nothing is fed to it
    engines["b"].turn(0, 0, 60)
    assert checks.check(3, engines) == {"a": True, "b": False}
    ranks["a"], ranks["b"] = [2], [2]
    engines["b"].turn(0, 0, 60)
    assert checks.check(4, engines) == {"a": False, "b": True}
    assert checks.paused == {"b"}
    engines["a"].turn(-90, -90, 0)  # back to where it was at the last look
    assert checks.check(5, engines) == {"a": True, "b": True}


def test_no_new_tokens_are_no_convergence() -> None:
    engine = Scripted()
    checks = rule({"a": [2]})
    engine.turn(0, 0, 0)
    for n in (1, 2, 3):  # the layer did not run again
        assert checks.check(n, {"a": engine}) == {"a": False}
    engine.turn(0, 60, 0)
    assert checks.check(4, {"a": engine}) == {"a": False}
    assert checks.check(5, {"a": engine}) == {"a": False}
    engine.turn(0, 0, 0)
    assert checks.check(6, {"a": engine}) == {"a": True}


def test_layers_that_share_a_decomposition_count_one_by_one() -> None:
    engine = Scripted()
    checks = rule({"q": [3, 2, 2]})
    engine.turn(0, 0, 0)
    checks.check(1, {"q": engine})
    engine.turn(0, 0, 60)
    assert checks.check(2, {"q": engine}) == {"q": False}
    assert checks.counts() == (6, 7)


def test_a_layer_without_variance_goes_on() -> None:
    checks = rule({"constant": [0], "varying": [2]})
    engines: dict[str, StreamingSVD] = {"constant": IncrementalSVD(8, 3), "varying": IncrementalSVD(8, 3)}
    engines["constant"].update(torch.ones(20, 8))
    engines["varying"].update(decaying(20, 8))
    assert checks.check(1, engines) == {"constant": True, "varying": False}
    assert not checks.paused


def test_the_sign_of_a_component_does_not_count() -> None:
    engine = Scripted()
    checks = rule({"a": [3]})
    for n in (1, 2):
        engine.turn(180, 180, 180)
        converged = checks.check(n, {"a": engine})
    assert converged == {"a": True}


@pytest.mark.parametrize("tau", [0.0, 1.01])
def test_tau_must_be_a_share(tau: float) -> None:
    def nothing(results: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return {}

    with pytest.raises(ValueError, match="tau must be a number above 0 and of at most 1, got"):
        SelectedCosineRule(tau, nothing)  # type: ignore[arg-type]
