"""The paper's incremental SVD: a rank-k factorization, updated batch after batch."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eva_lightning.svd import distributed
from eva_lightning.svd.inputs import flatten_tokens, full_precision, require_finite, token_mean, wide_dtype
from eva_lightning.svd.result import SVDResult
from eva_lightning.svd.subspace import canonical_sign, complete_rows, top_eigenpairs

if TYPE_CHECKING:
    from typing_extensions import Self

_DENSE_MAX_ROWS = 256
_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class _Factor:
    """Rank-m factorization of centred tokens: ``scaled^T scaled`` approximates ``Xc^T Xc``, m <= k."""

    scaled: Tensor  # (m, dim) fp32: singular values times right-singular vectors
    mean: Tensor  # (dim,) fp64
    n: int
    total_variance: float


class IncrementalSVD:
    """Incremental SVD of Ross et al. (2008), Algorithm 2 of the EVA paper.

    Only the top k singular values and right-singular vectors, the running mean and the running total variance are
    kept. A batch X with mean x, arriving after n tokens of mean m, is added by a truncated SVD of the stacked rows
    ``[diag(sigma) V; X - x; sqrt(n b / (n + b)) (m - x)]``; the last row corrects for the moving mean. (Its weight is
    that of Ross et al. and of scikit-learn; the one printed in line 6 of Algorithm 2 does not reproduce the covariance
    of the union.) The total variance follows Chan et al. (1983) and is exact, so explained-variance ratios have the
    true denominator although the tail of the spectrum is forgotten. What is truncated is lost: the result depends
    (slightly) on the order of the batches, and a direction that is weak at first may be underestimated.

    Tokens wait in a buffer until there are at least k of them; :meth:`result` counts those waiting too.

    Args:
        dim: Width of the inputs.
        k: Components kept, 1 <= k <= dim.
        device: Where the state lives; None: where the first batch is.

    Raises:
        ValueError: k outside [1, dim].
    """

    def __init__(self, dim: int, k: int, device: torch.device | str | None = None) -> None:
        if not 1 <= k <= dim:
            raise ValueError(f"The SVD needs 1 <= k <= dim, got k={k} for inputs of width {dim}.")
        self.dim = dim
        self.k = k
        self._device = None if device is None else torch.device(device)
        self._factor: _Factor | None = None
        self._waiting: list[Tensor] = []
        self._result: SVDResult | None = None

    @staticmethod
    def estimate_bytes(dim: int, k: int) -> int:
        """Bytes of the state of one engine, before it is allocated: factor, waiting tokens, result and mean."""
        return 3 * 4 * k * dim + 8 * dim

    @property
    def state_bytes(self) -> int:
        """Bytes the engine holds once it has seen tokens."""
        return self.estimate_bytes(self.dim, self.k)

    @property
    def n_samples(self) -> int:
        """Tokens seen, masked ones left out, waiting ones included."""
        return (0 if self._factor is None else self._factor.n) + sum(len(tokens) for tokens in self._waiting)

    @full_precision
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            x: Tokens, shape ``(..., dim)``, any floating dtype and strides.
            mask: True where a token counts, shape ``x.shape[:-1]``.

        Raises:
            FloatingPointError: NaN or Inf among the tokens that count. The engine is left as it was.
            TypeError: `x` is not floating point, or `mask` is.
            ValueError: Shapes that do not fit.
        """
        tokens, keep = flatten_tokens(x, mask, self.dim)
        if keep is not None:
            tokens = tokens[keep]
        if tokens.shape[0] == 0:
            return
        if self._device is None:
            self._device = tokens.device
        tokens = tokens.to(self._device)
        require_finite(float(torch.linalg.vector_norm(tokens)))
        self._result = None
        waiting = [*self._waiting, tokens]
        if sum(len(batch) for batch in waiting) < self.k:
            # The layer's caller owns (and may overwrite) the storage of its input.
            self._waiting.append(tokens.clone())
            return
        self._factor = self._absorb(self._factor, waiting)
        self._waiting = []

    @full_precision
    def merge(self, other: IncrementalSVD) -> Self:
        """Add everything `other` has seen, in place; `other` is left as it is.

        Associative and order-free up to rounding as long as k components hold all the variance, and up to the
        truncation otherwise.

        Raises:
            ValueError: The two engines differ in `dim` or `k`.
        """
        if (other.dim, other.k) != (self.dim, self.k):
            mine, theirs = f"({self.dim}, {self.k})", f"({other.dim}, {other.k})"
            raise ValueError(f"Only engines of equal (dim, k) can be merged, got {mine} and {theirs}.")
        self._result = None
        if self._device is None:
            self._device = other._device
        if other._factor is not None:
            self._factor = _combine(self._factor, _to(other._factor, self._device), self.k)
        waiting = [*self._waiting, *(tokens.to(self._device) for tokens in other._waiting)]
        if sum(len(tokens) for tokens in waiting) >= self.k:
            self._factor = self._absorb(self._factor, waiting)
            waiting = []
        self._waiting = waiting
        return self

    @full_precision
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Make every rank hold the union of what all ranks have seen; collective, in place.

        Every rank receives all factorizations (``k * dim`` each, plus mean and total variance; never activations) and
        merges them in rank order, so that the state is identical on all ranks. Call it once per stream, or on a
        :meth:`clone`: a second call would count the union once per rank.
        """
        device = self._device or distributed.default_device(group)
        local = self._current()
        counts = distributed.gather_counts(0 if local is None else local.n, group)
        rows = distributed.gather_counts(0 if local is None else local.scaled.shape[0], group)
        wide = wide_dtype(device)
        scaled = torch.zeros(0, self.dim, device=device) if local is None else local.scaled
        moments = torch.zeros(1, self.dim + 1, device=device, dtype=wide)
        if local is not None:
            moments[0, :-1], moments[0, -1] = local.mean, local.total_variance
        all_scaled = distributed.gather_rows(scaled, rows, group) if any(rows) else [scaled[:0]] * len(rows)
        all_moments = distributed.gather_rows(moments, [1] * len(rows), group)
        union: _Factor | None = None
        for count, factor, moment in zip(counts, all_scaled, all_moments, strict=True):
            if count:
                part = _Factor(factor, moment[0, :-1].clone(), count, float(moment[0, -1]))
                union = _combine(union, part, self.k)
        if union is not None:
            self._device = device
        self._factor, self._waiting, self._result = union, [], None
        return self

    @full_precision
    def clone(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    @full_precision
    def result(self) -> SVDResult:
        """The top k components of everything seen so far, waiting tokens included.

        Raises:
            RuntimeError: No token seen yet.
        """
        if self._result is None:
            factor = self._current()
            if factor is None:
                raise RuntimeError("The SVD has seen no tokens yet: call update() first.")
            self._result = _pack(factor, self.k)
        return self._result

    @full_precision
    def captured(self, components: Tensor) -> float:
        """Variance captured by orthonormal rows `components`, shape ``(m, dim)``, relative to the best k directions.

        The covariance is known through the kept factorization only; 1 when nothing varies.

        Raises:
            RuntimeError: No token seen yet.
        """
        result = self.result()
        wide = wide_dtype(result.components.device)
        sigma = result.singular_values.to(wide)
        optimum = float(sigma.square().sum())
        if optimum == 0:
            return 1.0
        overlap = result.components.to(wide) @ components.to(result.components.device, wide).T
        return float((sigma[:, None] * overlap).square().sum()) / optimum

    def _current(self) -> _Factor | None:
        """The factorization with the waiting tokens in it, computed aside: looking must not change the stream."""
        return self._absorb(self._factor, self._waiting) if self._waiting else self._factor

    def _absorb(self, factor: _Factor | None, batches: list[Tensor]) -> _Factor:
        tokens = torch.cat(batches) if len(batches) > 1 else batches[0]
        mean = token_mean(tokens)
        centred = (tokens - mean).float()
        wide = wide_dtype(tokens.device)
        total = float(torch.linalg.vector_norm(centred).to(wide).square())
        batch = _Factor(centred, mean.to(wide), len(tokens), total)
        return _combine(factor, batch, self.k)


def _combine(first: _Factor | None, second: _Factor, k: int) -> _Factor:
    """Factorization of the union of two sets of tokens, truncated to k rows."""
    rows, mean, n, total = [second.scaled], second.mean, second.n, second.total_variance
    if first is not None:
        n = first.n + second.n
        weight = first.n * second.n / n
        gap = first.mean - second.mean
        correction = (math.sqrt(weight) * gap).to(second.scaled.dtype)
        rows = [first.scaled, second.scaled, correction[None]]
        mean = first.mean - gap * (second.n / n)
        total = first.total_variance + second.total_variance + weight * float(gap.square().sum())
    return _Factor(_truncate(torch.cat(rows), k, first), mean, n, total)


def _truncate(rows: Tensor, k: int, warm: _Factor | None) -> Tensor:
    """The k strongest directions of a matrix of rows, each scaled by its singular value: shape ``(<= k, dim)``."""
    m, dim = rows.shape
    if min(m, dim) <= _DENSE_MAX_ROWS:
        _, sigma, v = torch.linalg.svd(rows, full_matrices=False)
        sigma, v = sigma[:k], v[:k]
    else:
        start = None
        if warm is not None:
            norms = torch.linalg.vector_norm(warm.scaled, dim=1, keepdim=True)
            if bool(norms.min() > 0):
                start = (warm.scaled / norms).T
        values, vectors = top_eigenpairs(lambda q: rows.T @ (rows @ q), dim, k, rows.device, start)
        sigma, v = values.sqrt().float(), vectors.T
    kept = sigma > _EPS * sigma[0]
    return (sigma[:, None] * canonical_sign(v))[kept]


def _to(factor: _Factor, device: torch.device | None) -> _Factor:
    return _Factor(factor.scaled.to(device), factor.mean.to(device), factor.n, factor.total_variance)


def _pack(factor: _Factor, k: int) -> SVDResult:
    wide = wide_dtype(factor.scaled.device)
    rounding = _EPS**2 * float(factor.mean.square().sum()) * factor.n
    total = factor.total_variance if factor.total_variance > rounding else 0.0
    # n centred samples span at most n - 1 directions: what is left of the rest is rounding.
    scaled = factor.scaled[: max(factor.n - 1, 0)] if total > 0 else factor.scaled[:0]
    sigma = torch.linalg.vector_norm(scaled.to(wide), dim=1)
    rows = complete_rows((scaled / sigma[:, None]).float(), k)
    values = torch.cat([sigma, sigma.new_zeros(k - len(sigma))])
    ratio = (values.square() / total).clamp_max(1.0) if total > 0 else torch.zeros_like(values)
    return SVDResult(
        components=canonical_sign(rows).contiguous(),
        singular_values=values.float(),
        explained_variance_ratio=ratio.float(),
        mean=factor.mean.float(),
        n_samples=factor.n,
        total_variance=total,
    )
