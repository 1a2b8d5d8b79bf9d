"""When has a stream been seen long enough? The doubling rule, and the paper's cosine rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from eva_lightning.svd.result import StreamingSVD, SVDResult


class StoppingRule(Protocol):
    """Decides per layer whether its components have converged. No engine stops because its layer has converged: the
    caller ends the stream for all layers at once, or layers would be biased to the first minibatches.
    """

    history: dict[str, list[tuple[int, float]]]

    def due(self, n_batches: int) -> bool:
        """Whether :meth:`check` wants to be called after this many minibatches (counted from 1)."""

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD]) -> dict[str, bool]:
        """Per layer: has it converged? Appends ``(n_batches, value)`` to ``history[layer]``."""


class DoublingRule:
    """Converged when what was found after half the minibatches still captures all the variance.

    At t = 2, 4, 8, ... minibatches a layer has converged if ``tr(V C V^T) >= tau * sum_{j<=k} lambda_j(C)`` with V the
    components at t/2 and C the covariance at t. Unlike the change per update, which shrinks like 1/t whatever the data,
    this compares two estimates that differ in half their data.

    Args:
        tau: Threshold in (0, 1].

    Raises:
        ValueError: tau outside (0, 1].
    """

    def __init__(self, tau: float = 0.99) -> None:
        self.tau = _check_tau(tau)
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._previous: dict[str, Tensor] = {}

    def due(self, n_batches: int) -> bool:
        """True at 1 (where the first components are noted), 2, 4, 8, ..."""
        return n_batches > 0 and n_batches & (n_batches - 1) == 0

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD]) -> dict[str, bool]:
        """Per layer: converged. A layer without tokens, or seen for the first time, has not."""
        converged = {}
        for layer, engine in engines.items():
            converged[layer] = False
            if engine.n_samples == 0:
                continue
            if layer in self._previous:
                value = engine.captured(self._previous[layer])
                self.history.setdefault(layer, []).append((n_batches, value))
                converged[layer] = value >= self.tau
            self._previous[layer] = engine.result().components
        return converged


class CosineRule:
    """The paper's rule (section 3.2): every component moved less than the threshold in the last update.

    Converged when ``|cos(v_j at t-1, v_j at t)| >= tau`` for all k components; the sign of a singular vector is
    arbitrary and does not count. Components without variance have no direction and do not count either.

    Args:
        tau: Threshold in (0, 1].

    Raises:
        ValueError: tau outside (0, 1].
    """

    def __init__(self, tau: float = 0.99) -> None:
        self.tau = _check_tau(tau)
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._previous: dict[str, SVDResult] = {}

    def due(self, n_batches: int) -> bool:
        """True after every minibatch (the first is where components are noted)."""
        return n_batches > 0

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD]) -> dict[str, bool]:
        """Per layer: converged. A layer without tokens, or seen for the first time, has not."""
        converged = {}
        for layer, engine in engines.items():
            converged[layer] = False
            if engine.n_samples == 0:
                continue
            result = engine.result()
            if layer in self._previous:
                value = smallest_cosine(self._previous[layer].components, result)
                self.history.setdefault(layer, []).append((n_batches, value))
                converged[layer] = value >= self.tau
            self._previous[layer] = result
        return converged


def smallest_cosine(previous: Tensor, result: SVDResult) -> float:
    """Smallest ``|cos|`` between matching rows, over the rows that have variance; 1 if none has.

    Args:
        previous: Orthonormal rows, shape ``(k, dim)``.
        result: The decomposition to compare with.
    """
    cosines = (previous.to(result.components.device) * result.components).sum(dim=1).abs()
    cosines = cosines[result.singular_values > 0]
    return float(cosines.min()) if len(cosines) else 1.0


def make_stopping_rule(name: str, tau: float = 0.99) -> DoublingRule | CosineRule:
    """Build the stopping rule called `name`: "captured" (doubling) or "cosine" (paper).

    Raises:
        ValueError: Unknown name, or tau outside (0, 1].
    """
    rules: dict[str, type[DoublingRule] | type[CosineRule]] = {"captured": DoublingRule, "cosine": CosineRule}
    if name not in rules:
        raise ValueError(f'Unknown stopping rule "{name}": expected "captured" or "cosine".')
    return rules[name](tau)


def _check_tau(tau: float) -> float:
    if not 0 < tau <= 1:
        raise ValueError(f"tau must be in (0, 1], got {tau}.")
    return float(tau)
