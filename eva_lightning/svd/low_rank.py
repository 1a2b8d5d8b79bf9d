"""Streaming SVD that keeps a low-rank factorization of the tokens: shared by the incremental and the sketch engine."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eva_lightning.svd import distributed
from eva_lightning.svd.eigensolver import canonical_sign, complete_rows, orthonormal_columns, top_eigenpairs
from eva_lightning.svd.engine import EPS, StreamingSVD, SVDResult, without_rounding
from eva_lightning.svd.inputs import full_precision, require_finite, squared_norm, wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

_DENSE_MAX_ROWS = 256


@dataclass(frozen=True)
class Factor:
    """Low-rank factorization of centred tokens: ``scaled^T scaled`` approximates ``Xc^T Xc`` from below.

    Attributes:
        scaled: Singular values times right-singular vectors, descending, shape ``(m, dim)``, fp32.
        mean: Mean of the tokens, shape ``(dim,)``, fp64.
        n: Tokens counted.
        total_variance: ``tr(Xc^T Xc)``, exact whatever was truncated.
    """

    scaled: Tensor
    mean: Tensor
    n: int
    total_variance: float


class FactoredSVD(StreamingSVD):
    """A streaming SVD whose state is a :class:`Factor`; subclasses say how a batch is absorbed into it.

    Args and errors: see :class:`StreamingSVD`.
    """

    def __init__(self, dim: int, k: int, device: torch.device | str | None = None) -> None:
        super().__init__(dim, k, device)
        self._factor: Factor | None = None
        self._waiting: list[Tensor] = []

    @staticmethod
    @abstractmethod
    def kept(dim: int, k: int) -> int:
        """Rows of the factorization."""

    @classmethod
    def estimate_bytes(cls, dim: int, k: int) -> int:
        """Bytes of the state of one engine, before it is allocated: factor, waiting tokens, result and mean."""
        return 4 * dim * (2 * cls.kept(dim, k) + k) + 12 * dim

    @classmethod
    def message_bytes(cls, dim: int, k: int) -> int:
        """Bytes every rank contributes when ranks are united: its factor, mean and total variance."""
        return 4 * dim * cls.kept(dim, k) + 8 * (dim + 1)

    @classmethod
    def flops_per_token(cls, dim: int, k: int) -> float:
        """Of an update: two products with the rows that are kept."""
        return 4.0 * dim * cls.kept(dim, k)

    @property
    def n_samples(self) -> int:
        """Tokens seen, masked ones left out, waiting ones included."""
        return self._counted() + sum(len(tokens) for tokens in self._waiting)

    def _take_in(self, tokens: Tensor) -> None:
        waiting = [*self._waiting, tokens]
        if sum(len(batch) for batch in waiting) < self.k:
            require_finite(float(squared_norm(tokens)))
            # The layer's caller owns (and may overwrite) the storage of its input.
            self._waiting.append(tokens.clone())
        else:
            self._add(_joined(waiting))
            self._waiting = []

    @full_precision
    def merge(self, other: Self) -> Self:
        """Add everything `other` has seen, in place; `other` is left as it is.

        Associative and order-free up to rounding as long as the rows kept hold all the variance, and up to the
        truncation otherwise.

        Raises:
            InputError: The two engines differ in `dim` or `k`.
        """
        self._require_same_size(other)
        self._result = None
        if self._device is None:
            self._device = other._device
        seen = other._condensed()
        if seen is not None:
            self._set(combine(self._condensed(), _to(seen, self._device), self.kept(self.dim, self.k)))
        waiting = [*self._waiting, *(tokens.to(self._device) for tokens in other._waiting)]
        if sum(len(tokens) for tokens in waiting) >= self.k:
            self._add(_joined(waiting))
            waiting = []
        self._waiting = waiting
        return self

    @full_precision
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Make every rank hold the union of what all ranks have seen; collective, in place, once per stream.

        Every rank receives all factorizations and merges them in rank order.
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
        union: Factor | None = None
        for count, factor, moment in zip(counts, all_scaled, all_moments, strict=True):
            if count:
                part = Factor(factor, moment[0, :-1].clone(), count, float(moment[0, -1]))
                union = combine(union, part, self.kept(self.dim, self.k))
        if union is not None:
            self._device = device
        self._set(union)
        self._waiting, self._result = [], None
        return self

    def _decompose(self) -> SVDResult:
        return _pack(self._seen(), self.k)

    def _variance_along(self, components: Tensor) -> float:
        """An estimate, and no bound: the covariance is known through the kept factorization only, which is below the
        true one.
        """
        result = self.result()
        scaled = self._seen().scaled if not self._waiting else result.singular_values[:, None] * result.components
        wide = wide_dtype(scaled.device)
        return float((scaled @ components.to(scaled.device, scaled.dtype).T).to(wide).square().sum())

    def _seen(self) -> Factor:
        self._require_tokens()
        factor = self._current()
        assert factor is not None
        return factor

    def _current(self) -> Factor | None:
        """The factorization with the waiting tokens in it, computed on a copy: this must not change the stream."""
        if not self._waiting:
            return self._condensed()
        aside = self.clone()
        aside._add(_joined(aside._waiting))
        return aside._condensed()

    def _set(self, factor: Factor | None) -> None:
        """Make `factor` the state; waiting tokens stay."""
        self._factor = factor

    @abstractmethod
    def _add(self, tokens: Tensor) -> None:
        """Take in `tokens`, shape ``(n, dim)``.

        Raises:
            FloatingPointError: NaN or Inf among the tokens; the state is left as it was.
        """

    @abstractmethod
    def _counted(self) -> int:
        """Tokens taken in."""

    @abstractmethod
    def _condensed(self) -> Factor | None:
        """The factorization of all tokens taken in; leaves the state as it is."""


def combine(first: Factor | None, second: Factor, kept: int) -> Factor:
    """Factorization of the union of two sets of tokens, truncated to `kept` rows."""
    rows, mean, n, total = [second.scaled], second.mean, second.n, second.total_variance
    if first is not None:
        correction, mean, n, total = united(first, second.mean, second.n, second.total_variance)
        rows = [first.scaled, second.scaled, correction[None]]
    return Factor(_truncate(torch.cat(rows), kept, first), mean, n, total)


def united(first: Factor, mean: Tensor, n: int, total_variance: float) -> tuple[Tensor, Tensor, int, float]:
    """Moments of the union of `first` with other tokens, given the moments of those (Chan et al. 1983).

    Returns:
        The row ``sqrt(n m / (n + m)) (mean - mean')`` that corrects for the moving mean, shape ``(dim,)``, fp32; then
        mean, count and total variance of the union.
    """
    count = first.n + n
    weight = first.n * n / count
    gap = first.mean - mean
    correction = (math.sqrt(weight) * gap).to(first.scaled.dtype)
    total = first.total_variance + total_variance + weight * float(gap.square().sum())
    return correction, first.mean - gap * (n / count), count, total


def _truncate(rows: Tensor, kept: int, warm: Factor | None) -> Tensor:
    """The strongest directions of a matrix of rows, each scaled by its singular value: shape ``(<= kept, dim)``."""
    m, dim = rows.shape
    if min(m, dim) <= _DENSE_MAX_ROWS:
        _, sigma, v = torch.linalg.svd(rows, full_matrices=False)
        sigma, v = sigma[:kept], v[:kept]
    else:
        start = None
        if warm is not None:
            norms = torch.linalg.vector_norm(warm.scaled, dim=1, keepdim=True)
            if bool(norms.min() > 0):
                start = (warm.scaled / norms).T
        values, vectors = top_eigenpairs(lambda q: rows.T @ (rows @ q), dim, kept, rows.device, start)
        sigma, v = values.sqrt().float(), vectors[:, :kept].T
    strong = sigma > EPS * sigma[0]
    return (sigma[:, None] * canonical_sign(v))[strong]


def _joined(batches: list[Tensor]) -> Tensor:
    return torch.cat(batches) if len(batches) > 1 else batches[0]


def _to(factor: Factor, device: torch.device | None) -> Factor:
    return Factor(factor.scaled.to(device), factor.mean.to(device), factor.n, factor.total_variance)


def _pack(factor: Factor, k: int) -> SVDResult:
    total = without_rounding(factor.total_variance, factor.mean, factor.n)
    # n centred samples span at most n - 1 directions: what is left of the rest is rounding.
    scaled = factor.scaled[: min(max(factor.n - 1, 0), k)] if total > 0 else factor.scaled[:0]
    sigma = torch.linalg.vector_norm(scaled.to(wide_dtype(scaled.device)), dim=1)
    # Weak rows carry rounding of the strong ones: orthonormalise from the strongest down.
    v = orthonormal_columns((scaled / sigma[:, None]).float().T).T if len(scaled) else scaled
    values = torch.cat([sigma, sigma.new_zeros(k - len(sigma))])
    return SVDResult.of(values.square(), complete_rows(v, k), total, factor.mean, factor.n)
