"""Stopping rules for a stream: the doubling rule, and the paper's cosine rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from eva_lightning.errors import check_choice, check_number
from eva_lightning.svd.eigensolver import CAPTURED_TOLERANCE
from eva_lightning.svd.engine import StreamingSVD, SVDResult
from eva_lightning.svd.solver import solve


class StoppingRule(Protocol):
    """Decides per layer whether its components have converged. Unless a rule says otherwise no engine stops because its
    layer has converged: the caller ends the stream for all layers at once, or layers would be biased to the first
    minibatches.

    Attributes:
        history: Layer -> ``[(n_batches, value), ...]``, the curve of what is compared with the threshold.
        paused: Layers whose engines are to be given no tokens for now.
    """

    history: dict[str, list[tuple[int, float]]]
    paused: frozenset[str] = frozenset()

    def due(self, n_batches: int) -> bool:
        """Whether :meth:`check` wants to be called after this many minibatches (counted from 1)."""

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD], across_ranks: bool = False) -> dict[str, bool]:
        """Per layer that has seen tokens: has it converged? Appends ``(n_batches, value)`` to ``history[layer]``.

        Args:
            n_batches: Minibatches streamed (on each rank).
            engines: Layer -> engine; may be empty of tokens.
            across_ranks: Decide about the union of all ranks' tokens; collective, see :func:`eva_lightning.svd.solve`.
        """

    def share(self, converged: Mapping[str, bool]) -> float:
        """How much has converged by the last :meth:`check`, which returned `converged`: the share of the layers."""
        return sum(converged.values()) / max(1, len(converged))


class DoublingRule(StoppingRule):
    """Converged when what was found after half the minibatches still captures all the variance.

    At t = 2, 4, 8, ... minibatches the value of a layer is ``q(t) = tr(V C V^T) / sum_{j<=k} lambda_j(C)`` with V the
    components at s = t/2 and C the covariance at t. Unlike the change per update, which shrinks like 1/t whatever the
    data, this compares two estimates that differ in half their data, and is about the share of the variance of unseen
    data that the components at t capture: V is fitted to one half of C and held out from the other.

    On a shuffled stream ``1 - q`` falls like 1/t. Where that promises the last layer's convergence half-way to the next
    doubling, layers are checked there too, with V of the last power of two s. What V misses grows like
    ``1/s - 1/t``, so ``1 - q`` is scaled by ``s / (t - s)`` to what V of t/2 would have missed.

    A layer has converged if ``q(t) >= tau`` and the value before was ``>= 1 - 3 (1 - tau)``, not before `min_batches`.
    On a shuffled stream the second condition costs nothing. On one sorted by class it asks for two such checks in a
    row, so that a class that fills the last minibatches cannot stand for all. (Comparing with the second half of the
    minibatches alone would not be sharper: by Ky Fan's inequality its ratio is at most ``(q D - a) / (D - a)``, with D
    and a the optima at t and t/2, which is 2 q - 1 while D = 2 a.) Nothing in a stream tells of classes that come after
    it, though: where one class fills more than `min_batches`, shuffle.

    Args:
        tau: Threshold in (0, 1].
        min_batches: Fewest minibatches.

    Raises:
        InputError: tau outside (0, 1].
    """

    def __init__(self, tau: float = 0.99, min_batches: int = 8) -> None:
        check_number("tau", tau, above=0, at_most=1)
        self.tau = tau
        self.min_batches = min_batches
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._previous: dict[str, Tensor] = {}
        self._noted_at = 0
        self._expected_at = 0

    def due(self, n_batches: int) -> bool:
        """True at the powers of two from a quarter of `min_batches` on, where the components are noted, and half-way
        between them where the last layer should have converged."""
        doubled = n_batches >= max(self.min_batches // 4, 1) and n_batches & (n_batches - 1) == 0
        return doubled or n_batches == self._expected_at

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD], across_ranks: bool = False) -> dict[str, bool]:
        """Per layer with tokens: converged. One seen for the first or second time has not.

        Solves to a tenth of ``1 - tau`` only, so values are exact to that and rarely too small.
        """
        tolerance = max((1 - self.tau) / 10, CAPTURED_TOLERANCE)
        solution = solve(engines, self._previous, tolerance=tolerance, across_ranks=across_ranks)
        scale = self._noted_at / (n_batches - self._noted_at)
        for layer, captured in solution.captured.items():
            self.history.setdefault(layer, []).append((n_batches, 1 - scale * (1 - captured)))
        if n_batches & (n_batches - 1) == 0:
            self._previous |= {layer: result.components for layer, result in solution.results.items()}
            self._noted_at = n_batches
            self._expect(n_batches, solution.captured)
        return {layer: n_batches >= self.min_batches and self._quiet(layer) for layer in solution.results}

    def _expect(self, n_batches: int, layers: Iterable[str]) -> None:
        """Note whether ``1 - q`` of the last layer should be down to ``1 - tau`` half-way to the next doubling."""
        worst = min((self.history[layer][-1][1] for layer in layers), default=0.0)
        self._expected_at = n_batches * 3 // 2 if 1 - worst <= 1.5 * (1 - self.tau) else 0

    def _quiet(self, layer: str) -> bool:
        last = [value for _, value in self.history.get(layer, [])[-2:]]
        return len(last) == 2 and last[1] >= self.tau and last[0] >= 1 - 3 * (1 - self.tau)


class CosineRule(StoppingRule):
    """The paper's rule (section 3.2): every component moved less than the threshold in the last update.

    Converged when ``|cos(v_j at t-1, v_j at t)| >= tau`` for all k components; the sign of a singular vector is
    arbitrary and does not count. Components without variance have no direction and do not count either.

    Args:
        tau: Threshold in (0, 1].

    Raises:
        InputError: tau outside (0, 1].
    """

    def __init__(self, tau: float = 0.99) -> None:
        check_number("tau", tau, above=0, at_most=1)
        self.tau = tau
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._previous: dict[str, SVDResult] = {}

    def due(self, n_batches: int) -> bool:
        """True after every minibatch (the first is where components are noted)."""
        return n_batches > 0

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD], across_ranks: bool = False) -> dict[str, bool]:
        """Per layer with tokens: converged. One seen for the first time has not."""
        converged = {}
        for layer, result in solve(engines, across_ranks=across_ranks).results.items():
            converged[layer] = False
            if layer in self._previous:
                value = smallest_cosine(self._previous[layer].components, result)
                self.history.setdefault(layer, []).append((n_batches, value))
                converged[layer] = value >= self.tau
            self._previous[layer] = result
        return converged


def smallest_cosine(previous: Tensor, result: SVDResult) -> float:
    """Smallest of :func:`cosines`."""
    return float(cosines(previous, result).min())


def cosines(previous: Tensor, result: SVDResult) -> Tensor:
    """``|cos|`` between matching rows, shape ``(k,)``; 1 for rows without variance, which have no direction.

    Args:
        previous: Orthonormal rows, shape ``(k, dim)``.
        result: The decomposition to compare with.
    """
    found = (previous.to(result.components.device) * result.components).sum(dim=1).abs()
    return torch.where(result.singular_values > 0, found, 1.0)


class NeverRule(StoppingRule):
    """Stream all minibatches there are."""

    def __init__(self, tau: float = 0.99) -> None:
        self.history: dict[str, list[tuple[int, float]]] = {}

    def due(self, n_batches: int) -> bool:
        """False."""
        return False

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD], across_ranks: bool = False) -> dict[str, bool]:
        """No layer has converged."""
        return dict.fromkeys(engines, False)


RULES: dict[str, type[DoublingRule | CosineRule | NeverRule]] = {
    "captured": DoublingRule,
    "cosine": CosineRule,
    "never": NeverRule,
}


def make_stopping_rule(name: str, tau: float = 0.99) -> StoppingRule:
    """Build the stopping rule called `name`: "captured" (doubling), "cosine" (paper) or "never".

    Raises:
        InputError: Unknown name, or tau outside (0, 1].
    """
    check_choice("stopping", name, RULES)
    return RULES[name](tau)
