"""The paper's stopping rule as its authors and PEFT run it: only components that get a rank have to converge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eva_lightning.errors import check_number
from eva_lightning.svd.distributed import from_first_rank
from eva_lightning.svd.engine import StreamingSVD, SVDResult
from eva_lightning.svd.solver import solve
from eva_lightning.svd.stopping import StoppingRule, cosines

Select = Callable[[Mapping[str, SVDResult]], Mapping[str, Sequence[int]]]
"""Decompositions so far -> for each how many of its components get a rank, once for every layer it stands for."""


class SelectedCosineRule(StoppingRule):
    """Section 3.2 and Algorithm 1 of the paper on the components that get a rank at present.

    After every minibatch the ranks are redistributed by what the decompositions hold by then. A component has
    converged if ``|cos(v_j at t-1, v_j at t)| >= tau`` in the last update of its layer; the sign of a singular vector
    is arbitrary and does not count, and neither does a component without variance. A layer has converged if all of its
    components that get a rank have. It is then `paused`, as Algorithm 1 wraps a converged weight and goes on with the
    others, until a redistribution gives it a component that has not converged. (So its decomposition is that of the
    minibatches up to then; a layer without any variance so far is not paused.)

    :meth:`share` is that of the components that get a rank, over all layers (delta in section C.3 of the paper).

    Args:
        tau: Threshold in (0, 1].
        select: Which components get a rank.

    Raises:
        InputError: tau outside (0, 1].
    """

    def __init__(self, tau: float, select: Select) -> None:
        check_number("tau", tau, above=0, at_most=1)
        self.tau = tau
        self.select = select
        self.history: dict[str, list[tuple[int, float]]] = {}
        self.paused: frozenset[str] = frozenset()
        self._results: dict[str, SVDResult] = {}
        self._cosines: dict[str, Tensor] = {}
        self._ranks: Mapping[str, Sequence[int]] = {}

    def due(self, n_batches: int) -> bool:
        """True after every minibatch (the first is where components are noted)."""
        return n_batches > 0

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD], across_ranks: bool = False) -> dict[str, bool]:
        """Per layer with tokens: converged. One seen for the first time has not, unless none of its components counts.

        Across ranks the first one decides for all: the others may differ in the last bit.
        """
        running = {layer: engine for layer, engine in engines.items() if layer not in self.paused}
        updated = [
            layer
            for layer, result in solve(running, across_ranks=across_ranks).results.items()
            if self._note(layer, result)
        ]
        self._ranks = self.select(self._results)
        if across_ranks:
            self._cosines, self._ranks = from_first_rank((self._cosines, self._ranks))
        for layer in updated:
            selected = self._cosines[layer][: self._needed(layer)]
            if bool((selected >= 0).all()):
                self.history.setdefault(layer, []).append((n_batches, float(min(selected, default=1.0))))
        converged = {layer: bool(self._passed(layer, self._needed(layer)).all()) for layer in self._results}
        varying = {layer for layer, result in self._results.items() if result.total_variance > 0}
        self.paused = frozenset(layer for layer in varying if converged[layer])
        return converged

    def share(self, converged: Mapping[str, bool]) -> float:
        """Share of the components that get a rank that have converged; 0 while nothing varies and none gets one."""
        passed, wanted = self.counts()
        return passed / max(1, wanted)

    def counts(self) -> tuple[int, int]:
        """How many components that get a rank have converged, and how many there are."""
        ranks = [(layer, rank) for layer, each in self._ranks.items() for rank in each]
        return sum(int(self._passed(layer, rank).sum()) for layer, rank in ranks), sum(rank for _, rank in ranks)

    def _note(self, layer: str, result: SVDResult) -> bool:
        """Take up a layer's decomposition; whether it has seen more tokens than before."""
        previous = self._results.get(layer)
        if previous is not None and previous.n_samples == result.n_samples:
            return False
        self._results[layer] = result
        unknown = torch.full((len(result.components),), -1.0)
        self._cosines[layer] = unknown if previous is None else cosines(previous.components, result).cpu()
        return True

    def _needed(self, layer: str) -> int:
        return max(self._ranks[layer], default=0)

    def _passed(self, layer: str, rank: int) -> Tensor:
        return self._cosines[layer][:rank] >= self.tau
