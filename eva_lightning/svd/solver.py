"""Solve the SVDs of many layers together, and of many processes with small messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from eva_lightning.svd import distributed
from eva_lightning.svd.eigensolver import CAPTURED_TOLERANCE, batched_top_eigenpairs, complete_rows
from eva_lightning.svd.engine import StreamingSVD, SVDResult
from eva_lightning.svd.exact import ExactSVD, decomposition
from eva_lightning.svd.inputs import full_precision


@dataclass(frozen=True)
class Solution:
    """Decompositions of many layers.

    Attributes:
        results: Layer -> decomposition; layers without tokens are left out.
        captured: Layer -> ``tr(V C V^T) / sum_{j<=k} lambda_j(C)`` of the rows V given for it; 1 when nothing varies.
    """

    results: dict[str, SVDResult] = field(default_factory=dict)
    captured: dict[str, float] = field(default_factory=dict)


@full_precision
def solve(
    engines: Mapping[str, StreamingSVD],
    components: Mapping[str, Tensor] | None = None,
    *,
    tolerance: float = CAPTURED_TOLERANCE,
    across_ranks: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Solution:
    """Decompose what all engines have seen; leaves what they have seen as it is.

    Exact engines of equal width are iterated together, each from its previous solution, until less than `tolerance` of
    the captured variance is missing. With `components`, the iteration starts there, and how much they capture comes
    for free.

    Across ranks the covariances stay where they are: with ``C = sum_r (C_r + n_r d_r d_r^T)`` and d_r the distance of
    rank r's mean to the common one, every iteration sums only the products ``C_r Q``
    (:meth:`ExactSVD.message_bytes`). Other engines exchange their factorizations. All ranks get the same results to
    the bit, and must call this with the same layers.

    Args:
        engines: Layer -> engine; may be empty of tokens.
        components: Layer -> orthonormal rows, shape ``(k, dim)``, for some or all layers.
        tolerance: Share of the captured variance that may be missing; stopping rules need little accuracy.
        across_ranks: Decompose the union of what all ranks have seen; collective.
        group: Process group; None: all processes.
    """
    components = {} if components is None else components
    solution = Solution()
    batches: dict[tuple[int, int, torch.device], list[str]] = {}
    for layer, engine in engines.items():
        if isinstance(engine, ExactSVD):
            if engine.n_samples or across_ranks:
                batches.setdefault((engine.dim, engine.k, engine.device), []).append(layer)
            continue
        union = engine.clone().all_reduce(group) if across_ranks else engine
        if union.n_samples:
            solution.results[layer] = union.result()
            if layer in components:
                solution.captured[layer] = union.captured(components[layer])
    for layers in batches.values():
        exact = {layer: engine for layer in layers if isinstance(engine := engines[layer], ExactSVD)}
        _solve_batch(exact, components, tolerance, _Ranks(across_ranks, group), solution)
    order = [layer for layer in engines if layer in solution.results]
    return Solution({layer: solution.results[layer] for layer in order}, solution.captured)


class _Ranks:
    """Sums over the ranks that take part: all of a group, or only this one."""

    def __init__(self, across: bool, group: dist.ProcessGroup | None) -> None:
        self.across = across
        self.group = group

    def sum(self, tensor: Tensor) -> Tensor:
        if self.across:
            distributed.sum_(tensor, self.group)
        return tensor

    def all(self, flags: Tensor) -> Tensor:
        """True where it is on every rank: ranks of unequal hardware must not diverge over a rounding."""
        if not self.across:
            return flags
        return self.sum(flags.to(torch.int32)) == dist.get_world_size(self.group)


@dataclass(frozen=True)
class _Moments:
    """Moments of the union over ranks, of several layers of equal width."""

    mean: Tensor  # (count, dim) fp64
    offset: Tensor  # (count, dim) fp64: this rank's mean minus the common one
    n: list[int]
    total: list[float]

    @classmethod
    def of(cls, engines: Sequence[ExactSVD], ranks: _Ranks) -> _Moments:
        own = [engine.moments() for engine in engines]
        means = torch.stack([mean for mean, _ in own])
        counts = means.new_tensor([[engine.n_samples] for engine in engines])
        sums = ranks.sum(torch.cat([means * counts, counts], dim=1))
        n = sums[:, -1:]
        mean = means if not ranks.across else sums[:, :-1] / n.clamp_min(1)
        offset = means - mean
        scatter = means.new_tensor([total for _, total in own]) + counts[:, 0] * offset.square().sum(dim=1)
        return cls(mean, offset, [int(i) for i in n[:, 0].tolist()], ranks.sum(scatter).tolist())


def _solve_batch(
    engines: Mapping[str, ExactSVD],
    components: Mapping[str, Tensor],
    tolerance: float,
    ranks: _Ranks,
    solution: Solution,
) -> None:
    """Add to `solution` the decompositions of engines of equal width and k."""
    moments = _Moments.of(list(engines.values()), ranks)
    numbers = {layer: i for i, layer in enumerate(engines)}
    varying = [layer for layer, i in numbers.items() if moments.total[i] > 0]
    if varying:
        chosen = [engines[layer] for layer in varying]
        dim, k, device = chosen[0].dim, chosen[0].k, chosen[0].device
        given = [components.get(layer) for layer in varying]
        starts = [
            engine.warm_start(moments.n[numbers[layer]], ranks.across)
            if rows is None
            else rows.to(device, torch.float32).T
            for layer, engine, rows in zip(varying, chosen, given, strict=True)
        ]
        offsets = [moments.offset[numbers[layer]] for layer in varying]

        def apply(q: Tensor, active: list[int]) -> Tensor:
            return ranks.sum(_products([chosen[i] for i in active], [offsets[i] for i in active], q, ranks.across))

        pairs = batched_top_eigenpairs(apply, starts, dim, k, device, tolerance, ranks.all, dense=not ranks.across)
    for layer, i in numbers.items():
        n, total, engine = moments.n[i], moments.total[i], engines[layer]
        if n == 0:
            continue
        mean = moments.mean[i]
        if total > 0:
            at = varying.index(layer)
            values, basis = pairs.values[at], pairs.basis[at]
            if layer in components:
                optimum = float(values.sum())
                solution.captured[layer] = float(pairs.start_variance[at]) / optimum if optimum > 0 else 1.0
        else:
            values, basis = mean.new_zeros(engine.k), complete_rows(mean.new_zeros(0, engine.dim).float(), engine.k).T
            if layer in components:
                solution.captured[layer] = 1.0
        result = decomposition(values, basis[:, : engine.k].T, total, mean, n)
        engine.remember(result, basis, tolerance <= CAPTURED_TOLERANCE, ranks.across)
        solution.results[layer] = result


def _products(engines: Sequence[ExactSVD], offsets: Sequence[Tensor], q: Tensor, across: bool) -> Tensor:
    """This rank's share of the covariances times q, shape ``(len(engines), dim, p)``."""
    z = []
    for engine, offset, q_i in zip(engines, offsets, q, strict=True):
        if not engine.n_samples:
            z.append(torch.zeros_like(q_i, dtype=offset.dtype if q_i.shape[0] == q_i.shape[1] else q_i.dtype))
            continue
        z.append(engine.product(q_i))
        if across:
            z[-1] += torch.outer(offset, engine.n_samples * (offset @ q_i.to(offset.dtype)))
    return torch.stack(z)
