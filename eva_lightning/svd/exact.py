"""Exact streaming SVD: accumulate the covariance of the tokens, then take its top eigenvectors."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eva_lightning.errors import InputError
from eva_lightning.svd import distributed
from eva_lightning.svd.eigensolver import canonical_sign, complete_rows, iterated_columns, top_eigenpairs
from eva_lightning.svd.inputs import (
    flatten_tokens,
    full_precision,
    require_finite,
    squared_norm,
    token_mean,
    wide_dtype,
)
from eva_lightning.svd.protocol import SVDResult

if TYPE_CHECKING:
    from typing_extensions import Self

_BLOCKED_MIN_DIM = 192
_BLOCKS = 6
_MIRROR_MAX_DIM = 1024
_EPS = torch.finfo(torch.float32).eps


class ExactSVD:
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

    Args:
        dim: Width of the inputs.
        k: Components wanted, 1 <= k <= dim.
        device: Where the state lives; None: where the first batch is.

    Raises:
        InputError: k outside [1, dim].
    """

    def __init__(self, dim: int, k: int, device: torch.device | str | None = None) -> None:
        if not 1 <= k <= dim:
            raise InputError(f"The SVD needs 1 <= k <= dim, got k={k} for inputs of width {dim}.")
        self.dim = dim
        self.k = k
        self.n_samples = 0
        self._device = None if device is None else torch.device(device)
        self._shift: Tensor | None = None  # (dim,) fp32
        self._second: Tensor | None = None  # (dim, dim) fp32; below the block diagonal stale until mirrored
        self._sum: Tensor | None = None  # (dim,) fp64
        self._mirrored = True
        self._warm: dict[bool, tuple[int, Tensor]] = {}  # across ranks or not -> tokens and basis of the previous solve
        self._result: SVDResult | None = None
        self._unverified: Tensor | None = None

    @staticmethod
    def estimate_bytes(dim: int, k: int) -> int:
        """Bytes of the state of one engine, before it is allocated."""
        return 4 * dim * dim + 12 * dim + 4 * dim * (k + iterated_columns(dim, k))

    @staticmethod
    def message_bytes(dim: int, k: int) -> int:
        """Bytes every rank contributes per subspace iteration when ranks are united by :func:`eva_lightning.svd.solve`;
        mean, count and total variance add ``8 * (dim + 2)`` once.
        """
        return 4 * dim * iterated_columns(dim, k)

    @property
    def state_bytes(self) -> int:
        """Bytes the engine holds once it has seen tokens."""
        return self.estimate_bytes(self.dim, self.k)

    @full_precision
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            x: Tokens, shape ``(..., dim)``, any floating dtype and strides.
            mask: True where a token counts, shape ``x.shape[:-1]``.

        Raises:
            FloatingPointError: NaN or Inf among the tokens that count. The engine is left as it was. On a GPU
                :meth:`verify` raises it.
            InputTypeError: `x` is not floating point, or `mask` is.
            InputError: Shapes that do not fit.
        """
        tokens, keep = flatten_tokens(x, mask, self.dim)
        if keep is not None:
            # Dropping masked tokens rather than zeroing them: what padding holds, NaN included, never matters.
            tokens = tokens[keep]
        if tokens.shape[0] == 0:
            return
        if self._device is not None:
            tokens = tokens.to(self._device)
        shift = token_mean(tokens).float() if self._shift is None else self._shift
        centred = (tokens - shift).float()
        squares = squared_norm(centred)
        if squares.device.type == "cpu":
            require_finite(float(squares))
        else:
            self._unverified = squares if self._unverified is None else self._unverified + squares
        state, row_sum = self._allocate(shift)
        _accumulate(state, centred)
        row_sum += centred.sum(dim=0)
        self.n_samples += tokens.shape[0]
        self._mirrored = False
        self._result = None

    def verify(self) -> None:
        """Raise FloatingPointError if earlier updates on a GPU met NaN or Inf."""
        unverified, self._unverified = self._unverified, None
        if unverified is not None:
            require_finite(float(unverified))

    @full_precision
    def merge(self, other: ExactSVD) -> Self:
        """Add everything `other` has seen, in place; `other` is left as it is.

        Associative and order-free up to rounding.

        Raises:
            InputError: The two engines differ in `dim` or `k`.
        """
        if (other.dim, other.k) != (self.dim, self.k):
            mine, theirs = f"({self.dim}, {self.k})", f"({other.dim}, {other.k})"
            raise InputError(f"Only engines of equal (dim, k) can be merged, got {mine} and {theirs}.")
        if other._shift is None or other._second is None or other._sum is None:
            return self
        if self._device is None:
            self._device = other._shift.device
        other_shift = other._shift.to(self._device)
        state, row_sum = self._allocate(other_shift)
        _, _, shift = self._state()
        # The shift of the larger side is nearer to the common mean, so less cancels when the mean is taken out.
        common = other_shift if other.n_samples > self.n_samples else shift
        _recentre(state, row_sum, self.n_samples, shift.to(row_sum.dtype) - common)
        self._shift = common
        offset = other_shift.to(row_sum.dtype) - common
        other_sum = other._sum.to(self._device)
        state += other._full().to(state.device)
        _add_offset(state, other_sum, other.n_samples, offset)
        row_sum += other_sum + other.n_samples * offset
        self.n_samples += other.n_samples
        self._mirrored = False
        self._result = None
        return self

    @full_precision
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Make every rank hold the union of what all ranks have seen; collective, in place.

        Every rank re-centres to the shift of the rank with most tokens, then S, s and n are summed: the message is the
        state (``4 * dim**2`` bytes), never activations, and the state is identical on all ranks. Call it once per
        stream, or on a :meth:`clone`: a second call would count the union once per rank.
        """
        device = self._device or distributed.default_device(group)
        counts = distributed.gather_counts(self.n_samples, group)
        if sum(counts) == 0:
            return self
        self._device = device
        source = counts.index(max(counts))
        shift = torch.zeros(self.dim, device=device) if self._shift is None else self._shift.clone()
        distributed.broadcast(shift, source, group)
        if self._shift is None:
            self._allocate(shift)
        state, row_sum, own = self._state()
        self._mirror()
        _recentre(state, row_sum, self.n_samples, own.to(row_sum.dtype) - shift)
        distributed.sum_(state, group)
        distributed.sum_(row_sum, group)
        self._shift, self.n_samples = shift, sum(counts)
        # A warm start from local history would differ between ranks in its last bits.
        self._warm, self._result = {}, None
        return self

    @full_precision
    def clone(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    @full_precision
    def result(self) -> SVDResult:
        """The top k components of everything seen so far.

        Raises:
            RuntimeError: No token seen yet.
        """
        if self._result is None:
            self._state()
            mean, total = self.moments()
            values, basis = mean.new_zeros(self.k), complete_rows(mean.new_zeros(0, self.dim).float(), self.k).T
            if total > 0:
                start = self.warm_start(self.n_samples)
                values, basis = top_eigenpairs(self.product, self.dim, self.k, mean.device, start)
                # n centred samples span at most n - 1 directions: what is left of the rest is rounding.
                values[max(self.n_samples - 1, 0) :] = 0
            result = decomposition(values, basis[:, : self.k].T, total, mean, self.n_samples)
            self.remember(result, basis, final=True)
        assert self._result is not None
        return self._result

    @full_precision
    def captured(self, components: Tensor) -> float:
        """Variance captured by orthonormal rows `components`, shape ``(m, dim)``, relative to the best k directions.

        ``tr(V C V^T) / sum_{j<=k} lambda_j(C)``; 1 when nothing varies.

        Raises:
            RuntimeError: No token seen yet.
        """
        wide = wide_dtype(self._state()[0].device)
        optimum = float(self.result().singular_values.to(wide).square().sum())
        if optimum == 0:
            return 1.0
        v = components.to(self._state()[0].device, torch.float32).T
        return float((v.to(wide) * self.product(v).to(wide)).sum()) / optimum

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
        if not 1 <= k <= self.dim:
            raise InputError(f"The SVD needs 1 <= k <= dim, got k={k} for inputs of width {self.dim}.")
        values, vectors = torch.linalg.eigh(self._covariance(torch.float32))
        mean, total = self.moments()
        return decomposition(values[:k].to(mean.dtype).clamp_min(0), vectors[:, :k].T, total, mean, self.n_samples)

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._second is None or self._sum is None or self._shift is None:
            raise RuntimeError("The SVD has seen no tokens yet: call update() first.")
        return self._second, self._sum, self._shift

    def _allocate(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        if self._second is None or self._sum is None:
            self._device = shift.device
            self._shift = shift
            self._second = torch.zeros(self.dim, self.dim, device=shift.device)
            self._sum = torch.zeros(self.dim, device=shift.device, dtype=wide_dtype(shift.device))
        return self._second, self._sum

    def _mirror(self) -> None:
        if self._mirrored:
            return
        second, _, _ = self._state()
        for start, stop in _block_bounds(self.dim):
            second[stop:, start:stop] = second[start:stop, stop:].T
        self._mirrored = True

    def _full(self) -> Tensor:
        self._mirror()
        return self._state()[0]

    def _covariance(self, dtype: torch.dtype) -> Tensor:
        second, row_sum, _ = self._state()
        self._mirror()
        return second.to(dtype) - (torch.outer(row_sum, row_sum) / self.n_samples).to(dtype)

    def _total_variance(self) -> float:
        second, row_sum, _ = self._state()
        wide = row_sum.dtype
        total = float(second.diagonal().to(wide).sum() - row_sum.square().sum() / self.n_samples)
        rounding = _EPS**2 * float(self._mean().square().sum()) * self.n_samples
        return total if total > rounding else 0.0

    def _mean(self) -> Tensor:
        _, row_sum, shift = self._state()
        return shift.to(row_sum.dtype) + row_sum / self.n_samples

    @full_precision
    def moments(self) -> tuple[Tensor, float]:
        """Mean of the tokens, shape ``(dim,)``, fp64, and their total variance; zeros before any token."""
        if self._sum is None:
            return torch.zeros(self.dim, dtype=wide_dtype(self.device), device=self.device), 0.0
        return self._mean(), self._total_variance()

    @full_precision
    def product(self, q: Tensor) -> Tensor:
        """``Xc^T Xc @ q`` without forming the centred matrix: fp32, or fp64 if q is square, which only narrow ones are.

        Args:
            q: Shape ``(dim, p)``, fp32.
        """
        second, row_sum, _ = self._state()
        if self.dim < _MIRROR_MAX_DIM:
            self._mirror()
        if q.shape[1] == self.dim:
            second, q = second.to(row_sum.dtype), q.to(row_sum.dtype)
        coefficients = (row_sum @ q.to(row_sum.dtype)) / self.n_samples
        return _symmetric_product(second, q, self._mirrored).sub_(torch.outer(row_sum, coefficients))

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._device or torch.device("cpu")

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
    """The result of an engine from eigenpairs of its covariance.

    Args:
        values: Eigenvalues, descending, shape ``(k,)``, fp64.
        rows: Orthonormal eigenvectors, shape ``(k, dim)``, fp32.
        total: Total variance; with 0, the eigenvectors are arbitrary.
        mean: Mean of the tokens, shape ``(dim,)``.
        n: Tokens.
    """
    values = torch.where(values > _EPS * values.max(), values, 0)
    ratio = (values / total).clamp_max(1.0) if total > 0 else torch.zeros_like(values)
    return SVDResult(
        components=canonical_sign(rows).contiguous(),
        singular_values=values.sqrt().float(),
        explained_variance_ratio=ratio.float(),
        mean=mean.float(),
        n_samples=n,
        total_variance=total,
    )


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


def _recentre(second: Tensor, row_sum: Tensor, n: int, offset: Tensor) -> None:
    """Move the shift of a state by minus `offset`, in place."""
    if n and bool(offset.any()):
        _add_offset(second, row_sum, n, offset)
        row_sum += n * offset


def _add_offset(second: Tensor, row_sum: Tensor, n: int, offset: Tensor) -> None:
    """Turn ``sum y y^T`` into ``sum (y + o)(y + o)^T`` given ``sum y`` and n, as two rank-one updates."""
    half = (row_sum + n * offset / 2).to(second.dtype)
    o = offset.to(second.dtype)
    second.addr_(half, o)
    second.addr_(o, half)
