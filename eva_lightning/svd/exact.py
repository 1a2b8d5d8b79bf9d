"""Exact streaming SVD: accumulate the covariance of the tokens, then take its top eigenvectors."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eva_lightning.errors import check_number
from eva_lightning.svd import distributed
from eva_lightning.svd.eigensolver import complete_rows, iterated_columns, top_eigenpairs
from eva_lightning.svd.engine import EPS, StreamingSVD, SVDResult, without_rounding
from eva_lightning.svd.inputs import (
    centred_pieces,
    full_precision,
    require_finite,
    squared_norm,
    token_mean,
    wide_dtype,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCKED_MIN_DIM = 192
_BLOCKS = 6
_MIRROR_MAX_DIM = 1024


@dataclass
class _Sums:
    """Sums over tokens ``Y = X - shift``.

    Attributes:
        shift: Shape ``(dim,)``, fp32.
        second: ``sum Y^T Y``, shape ``(dim, dim)``, fp32; below the block diagonal stale until mirrored.
        row_sum: ``sum Y``, shape ``(dim,)``, fp64.
        n: Tokens.
        mirrored: Whether `second` is right below the block diagonal too.
    """

    shift: Tensor
    second: Tensor
    row_sum: Tensor
    n: int = 0
    mirrored: bool = True

    @classmethod
    def empty(cls, shift: Tensor) -> _Sums:
        dim, device = len(shift), shift.device
        row_sum = torch.zeros(dim, device=device, dtype=wide_dtype(device))
        return cls(shift, torch.zeros(dim, dim, device=device), row_sum)

    @property
    def mean(self) -> Tensor:
        return self.shift.to(self.row_sum.dtype) + self.row_sum / self.n

    @property
    def total_variance(self) -> float:
        diagonal = self.second.diagonal().to(self.row_sum.dtype)
        total = float(diagonal.sum() - self.row_sum.square().sum() / self.n)
        return without_rounding(total, self.mean, self.n)

    def mirror(self) -> None:
        if not self.mirrored:
            for start, stop in _block_bounds(len(self.shift)):
                self.second[stop:, start:stop] = self.second[start:stop, stop:].T
            self.mirrored = True

    def move_to(self, shift: Tensor) -> None:
        """Change the shift."""
        offset = self.shift.to(self.row_sum.dtype) - shift
        if self.n and bool(offset.any()):
            _add_offset(self.second, self.row_sum, self.n, offset)
            self.row_sum += self.n * offset
        self.shift = shift


class ExactSVD(StreamingSVD):
    """Streaming SVD that loses nothing: the result does not depend on how the tokens were cut into batches.

    The covariance is accumulated about a fixed shift ``c``, the mean of the first batch: with ``Y = X - c`` the state
    is ``S = sum Y^T Y`` (fp32), ``s = sum Y`` (fp64) and the count n, and ``Xc^T Xc = S - s s^T / n``. Shifting before
    anything is rounded is what keeps inputs with a large mean exact. The top k eigenvectors come from subspace
    iteration warm-started at the previous result (narrow layers by ``eigh``), to a captured variance of at least
    1 - 1e-6 of the optimum. :func:`eva_lightning.svd.solve` does that for many layers at once.

    Eigenvalues below the fp32 resolution of the covariance (1.2e-7 of the largest) are reported as 0. Inputs whose
    standard deviation is below the fp32 rounding of their mean count as constant.

    The state takes ``4 * dim**2`` bytes. On hardware where torch lowers the precision of fp32 products
    (``torch.set_float32_matmul_precision``), the accumulation follows that setting; the small factorisations do not.

    Example::

        engine = ExactSVD(dim=768, k=32)
        for x in layer_inputs:  # (batch, tokens, 768)
            engine.update(x)
        a = engine.result().components  # (32, 768)

    Args and errors: see :class:`StreamingSVD`.
    """

    def __init__(self, dim: int, k: int, device: torch.device | str | None = None) -> None:
        super().__init__(dim, k, device)
        self._sums: _Sums | None = None
        self._warm: dict[bool, tuple[int, Tensor]] = {}  # across ranks or not -> tokens and basis of the previous solve
        self._unverified: Tensor | None = None

    @classmethod
    def estimate_bytes(cls, dim: int, k: int) -> int:
        """Bytes of the state of one engine, before it is allocated."""
        return 4 * dim * dim + 16 * dim + 4 * dim * (k + iterated_columns(dim, k))

    @classmethod
    def message_bytes(cls, dim: int, k: int) -> int:
        """Bytes every rank contributes per subspace iteration when ranks are united by :func:`eva_lightning.svd.solve`;
        mean, count and total variance add ``8 * (dim + 2)`` once.
        """
        return 4 * dim * iterated_columns(dim, k)

    @classmethod
    def flops_per_token(cls, dim: int, k: int) -> float:
        """Of an update: the blocks on and above the diagonal."""
        return 2.0 * sum((stop - start) * (dim - start) for start, stop in _block_bounds(dim))

    @property
    def n_samples(self) -> int:
        """Tokens seen, masked ones left out."""
        return 0 if self._sums is None else self._sums.n

    def _take_in(self, tokens: Tensor) -> None:
        shift = token_mean(tokens).float() if self._sums is None else self._sums.shift
        squares = squared_norm(tokens)
        if squares.device.type == "cpu":
            require_finite(float(squares))
        else:
            self._unverified = squares if self._unverified is None else self._unverified + squares
        sums = self._allocated(shift)
        for centred in centred_pieces(tokens, shift):
            _accumulate(sums.second, centred)
            sums.row_sum += centred.sum(dim=0)
        sums.n += tokens.shape[0]
        sums.mirrored = False

    def verify(self) -> None:
        """Raise FloatingPointError if earlier updates on a GPU met NaN or Inf."""
        unverified, self._unverified = self._unverified, None
        if unverified is not None:
            require_finite(float(unverified))

    @full_precision
    def merge(self, other: Self) -> Self:
        """Add everything `other` has seen, in place; `other` is left as it is.

        Associative and order-free up to rounding.

        Raises:
            InputError: The two engines differ in `dim` or `k`.
        """
        self._require_same_size(other)
        theirs = other._sums
        if theirs is None:
            return self
        if self._device is None:
            self._device = theirs.shift.device
        shift, row_sum = theirs.shift.to(self._device), theirs.row_sum.to(self._device)
        sums = self._allocated(shift)
        # The shift of the larger side is nearer to the common mean, so less cancels when the mean is taken out.
        sums.move_to(shift if theirs.n > sums.n else sums.shift)
        offset = shift.to(row_sum.dtype) - sums.shift
        theirs.mirror()
        sums.second += theirs.second.to(self._device)
        _add_offset(sums.second, row_sum, theirs.n, offset)
        sums.row_sum += row_sum + theirs.n * offset
        sums.n += theirs.n
        sums.mirrored = False
        self._result = None
        return self

    @full_precision
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Make every rank hold the union of what all ranks have seen; collective, in place, once per stream.

        Every rank re-centres to the shift of the rank with most tokens, then S, s and n are summed: here the message is
        the state (``4 * dim**2`` bytes), which :func:`eva_lightning.svd.solve` avoids.
        """
        device = self._device or distributed.default_device(group)
        counts = distributed.gather_counts(self.n_samples, group)
        if sum(counts) == 0:
            return self
        self._device = device
        source = counts.index(max(counts))
        shift = torch.zeros(self.dim, device=device) if self._sums is None else self._sums.shift.clone()
        distributed.broadcast(shift, source, group)
        sums = self._allocated(shift)
        sums.mirror()
        sums.move_to(shift)
        distributed.sum_(sums.second, group)
        distributed.sum_(sums.row_sum, group)
        sums.n = sum(counts)
        # A warm start from local history would differ between ranks in its last bits.
        self._warm, self._result = {}, None
        return self

    def _decompose(self) -> SVDResult:
        mean, total = self.moments()
        values, basis = mean.new_zeros(self.k), complete_rows(mean.new_zeros(0, self.dim).float(), self.k).T
        if total > 0:
            start = self.warm_start(self.n_samples)
            values, basis = top_eigenpairs(self.product, self.dim, self.k, mean.device, start)
        result = decomposition(values, basis[:, : self.k].T, total, mean, self.n_samples)
        self.remember(result, basis, final=True)
        return result

    def _variance_along(self, components: Tensor) -> float:
        v = components.to(self.device, torch.float32).T
        wide = wide_dtype(self.device)
        return float((v.to(wide) * self.product(v).to(wide)).sum())

    @full_precision
    def minor(self, k: int | None = None) -> SVDResult:
        """The k least-variance components, ascending in variance, with their singular values.

        The bottom of the spectrum has no gap that iteration could use: this runs a dense ``eigh`` (8 s at width 4096
        on one core), which is acceptable only because it serves one ablation (paper Table 12).

        Raises:
            RuntimeError: No token seen yet.
            InputError: k outside [1, dim].
        """
        k = self.k if k is None else k
        check_number("k", k, at_least=1, at_most=self.dim, whole=True)
        sums = self._seen()
        sums.mirror()
        outer = torch.outer(sums.row_sum, sums.row_sum) / sums.n
        values, vectors = torch.linalg.eigh(sums.second - outer.float())
        values = _above_rounding(values[:k].to(sums.mean.dtype).clamp_min(0))
        return SVDResult.of(values, vectors[:, :k].T, sums.total_variance, sums.mean, sums.n)

    def _seen(self) -> _Sums:
        self._require_tokens()
        assert self._sums is not None
        return self._sums

    def _allocated(self, shift: Tensor) -> _Sums:
        if self._sums is None:
            self._sums = _Sums.empty(shift)
        return self._sums

    @full_precision
    def moments(self) -> tuple[Tensor, float]:
        """Mean of the tokens, shape ``(dim,)``, fp64, and their total variance; zeros before any token."""
        if self._sums is None or not self._sums.n:
            return torch.zeros(self.dim, dtype=wide_dtype(self.device), device=self.device), 0.0
        return self._sums.mean, self._sums.total_variance

    @full_precision
    def product(self, q: Tensor) -> Tensor:
        """``Xc^T Xc @ q`` without forming the centred matrix: fp32, or fp64 if q is square, which only narrow ones are.

        Args:
            q: Shape ``(dim, p)``, fp32.
        """
        sums = self._seen()
        if self.dim < _MIRROR_MAX_DIM:
            sums.mirror()
        second, row_sum = sums.second, sums.row_sum
        if q.shape[1] == self.dim:
            second, q = second.to(row_sum.dtype), q.to(row_sum.dtype)
        coefficients = (row_sum @ q.to(row_sum.dtype)) / sums.n
        return _symmetric_product(second, q, sums.mirrored).sub_(torch.outer(row_sum, coefficients))

    def warm_start(self, n_samples: int, across_ranks: bool = False) -> Tensor | None:
        """Where to start a solve, shape ``(dim, m)``: the previous eigenvectors, or all columns iterated then if there
        were as many tokens as now. Solves across ranks remember their own, which is the same on all ranks.
        """
        if across_ranks not in self._warm:
            return None
        n, basis = self._warm[across_ranks]
        return basis if n == n_samples else basis[:, : self.k]

    def remember(self, result: SVDResult, basis: Tensor, final: bool, across_ranks: bool = False) -> None:
        """Start the next solve from `basis`; if `result` is `final`, also return it until the next update."""
        self._warm[across_ranks] = (result.n_samples, basis)
        if final and not across_ranks:
            self._result = result


def decomposition(values: Tensor, rows: Tensor, total: float, mean: Tensor, n: int) -> SVDResult:
    """The result of an engine from the top eigenpairs of its covariance; arguments as in :meth:`SVDResult.of`."""
    # n centred samples span at most n - 1 directions: what is left of the rest is rounding.
    values[max(n - 1, 0) :] = 0
    return SVDResult.of(_above_rounding(values), rows, total, mean, n)


def _above_rounding(values: Tensor) -> Tensor:
    return torch.where(values > EPS * values.max(), values, 0)


def _block_bounds(dim: int) -> list[tuple[int, int]]:
    if dim < _BLOCKED_MIN_DIM:
        return [(0, dim)]
    edges = [round(i * dim / _BLOCKS) for i in range(_BLOCKS + 1)]
    return list(itertools.pairwise(edges))


def _accumulate(second: Tensor, centred: Tensor) -> None:
    """Add ``Y^T Y`` to the blocks on and above the diagonal: 21 of 36 block products instead of all."""
    for start, stop in _block_bounds(second.shape[0]):
        second[start:stop, start:].addmm_(centred[:, start:stop].T, centred[:, start:])


def _symmetric_product(second: Tensor, q: Tensor, mirrored: bool) -> Tensor:
    """``second @ q`` from the blocks on and above the diagonal: mirroring a wide matrix takes longer than a product."""
    if mirrored:
        return second @ q
    z = torch.zeros_like(q)
    for start, stop in _block_bounds(second.shape[0]):
        z[start:stop].addmm_(second[start:stop, start:], q[start:])
        z[stop:].addmm_(second[start:stop, stop:].T, q[start:stop])
    return z


def _add_offset(second: Tensor, row_sum: Tensor, n: int, offset: Tensor) -> None:
    """Turn ``sum y y^T`` into ``sum (y + o)(y + o)^T`` given ``sum y`` and n, as two rank-one updates."""
    half = (row_sum + n * offset / 2).to(second.dtype)
    o = offset.to(second.dtype)
    second.addr_(half, o)
    second.addr_(o, half)
