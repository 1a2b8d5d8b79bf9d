"""Low-memory streaming SVD for wide layers: a block power method whose basis is renewed as the stream doubles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eva_lightning.svd.eigensolver import gaussian, orthonormal_columns
from eva_lightning.svd.engine import EPS
from eva_lightning.svd.inputs import centred_pieces, require_finite, squared_norm, token_mean, wide_dtype
from eva_lightning.svd.low_rank import Factor, FactoredSVD

# Directions beyond k that are followed: those of flat spectra are not told apart from the top k at once.
_MORE = 8
_FRESH = 16
_DEPENDENT = 1e-6


@dataclass
class _Block:
    """The stream since the basis was last renewed, seen through that basis.

    Attributes:
        basis: Q, nearly orthonormal columns, shape ``(dim, p)``, fp32.
        product: ``sum Y^T (Y Q)`` over the tokens Y minus the mean before them, shape ``(dim, p)``, fp32.
        row_sum: Sum of Y over tokens, shape ``(dim,)``, fp64.
        squares: Sum of the squares of all entries of Y, a scalar, fp64.
        n: Tokens.
    """

    basis: Tensor
    product: Tensor
    row_sum: Tensor
    squares: Tensor
    n: int = 0


class SketchSVD(FactoredSVD):
    """Streaming block power method with a Nyström approximation (Halko et al. 2011; Tropp et al. 2017).

    The state is a factorization of rank 2k + 8 of what was seen up to some point, and since then only the product of
    the covariance with an orthonormal basis Q: the 2k + 8 directions known at that point and 16 fresh Gaussian ones,
    which notice what is orthogonal to everything before. An update costs two products of the batch with 2k + 24 columns
    instead of one with `dim` columns. Whenever the number of tokens has doubled, and when a result is asked for, the
    covariance C is approximated by ``C Q (Q^T C Q)^-1 (C Q)^T``, truncated to rank 2k + 8, and Q is renewed: a handful
    of times in a stream. The approximation is below C, so singular values are underestimated, never overestimated;
    total variance and mean are exact.

    State and messages between ranks are O(k * dim). What is truncated is lost, so the result depends slightly on the
    order of the batches.

    Args and errors: see :class:`~eva_lightning.svd.engine.StreamingSVD`.
    """

    _block: _Block | None = None

    @staticmethod
    def kept(dim: int, k: int) -> int:
        """Rows of the factorization."""
        return min(2 * k + _MORE, dim)

    @classmethod
    def estimate_bytes(cls, dim: int, k: int) -> int:
        """Bytes of the state of one engine, before it is allocated: factorization, block and result."""
        return 4 * dim * (cls.kept(dim, k) + 2 * _columns(dim, k) + k) + 20 * dim

    def _add(self, tokens: Tensor) -> None:
        if self._factor is None or self._block is None:
            self._set(_first(tokens, self.kept(self.dim, self.k), _columns(self.dim, self.k)))
            return
        block = self._block
        zeros = torch.zeros_like
        transposed = block.product.new_zeros(block.product.T.shape)
        seen = _Block(block.basis, transposed, zeros(block.row_sum), zeros(block.squares))
        # Shifting by the mean before them leaves the tokens a mean small enough to be taken out of the products.
        for centred in centred_pieces(tokens, self._factor.mean):
            # short and wide: BLAS libraries take a quarter longer for the same product tall and narrow
            seen.product.addmm_((centred @ block.basis).T, centred)
            seen.row_sum += centred.sum(dim=0)
            seen.squares += squared_norm(centred)
        if seen.squares.device.type == "cpu":
            require_finite(float(seen.squares))
        block.product += seen.product.T
        block.row_sum += seen.row_sum
        block.squares += seen.squares
        block.n += len(tokens)
        if block.n >= self._factor.n:
            self.verify()
            self._set(self._condensed())

    def _set(self, factor: Factor | None) -> None:
        super()._set(factor)
        self._block = None
        if factor is not None:
            known = (factor.scaled / torch.linalg.vector_norm(factor.scaled, dim=1, keepdim=True)).T
            p = _columns(self.dim, self.k)
            fresh = gaussian(self.dim, p - known.shape[1], known.device, seed=factor.n) / self.dim**0.5
            basis = torch.cat([known, fresh - known @ (known.T @ fresh)], dim=1)
            zeros = torch.zeros_like(factor.mean)
            self._block = _Block(basis, torch.zeros_like(basis), zeros, zeros.new_zeros(()))

    def verify(self) -> None:
        """Raise FloatingPointError if earlier updates on a GPU met NaN or Inf."""
        if self._block is not None and self._block.squares.device.type != "cpu":
            require_finite(float(self._block.squares))

    def _counted(self) -> int:
        return (0 if self._factor is None else self._factor.n) + (0 if self._block is None else self._block.n)

    def _condensed(self) -> Factor | None:
        factor, block = self._factor, self._block
        if factor is None or block is None or block.n == 0:
            return factor
        n = factor.n + block.n
        mean_product = block.basis.T.to(block.row_sum.dtype) @ block.row_sum
        product = torch.addmm(block.product, factor.scaled.T, factor.scaled @ block.basis)
        product -= torch.outer(block.row_sum, mean_product / n).float()
        return Factor(
            _nystrom(block.basis, product, self.kept(self.dim, self.k)),
            factor.mean + block.row_sum / n,
            n,
            factor.total_variance + max(float(block.squares - block.row_sum.square().sum() / n), 0.0),
        )


def _columns(dim: int, k: int) -> int:
    return min(2 * k + _MORE + _FRESH, dim)


def _first(tokens: Tensor, kept: int, columns: int) -> Factor:
    """The factorization of the first tokens, shape ``(n, dim)``, for which there is no basis to start from."""
    mean = token_mean(tokens)
    centred = (tokens - mean).float()
    squares = float(squared_norm(centred))
    require_finite(squares)
    drift = centred.mean(dim=0)
    centred -= drift
    basis = gaussian(centred.shape[1], columns, tokens.device)
    basis = orthonormal_columns(centred.T @ (centred @ basis), torch.float32)
    rows = _nystrom(basis, centred.T @ (centred @ basis), kept)
    wide = wide_dtype(tokens.device)
    total = max(squares - len(tokens) * float(drift.to(wide).square().sum()), 0.0)
    return Factor(rows, (mean + drift).to(wide), len(tokens), total)


def _nystrom(basis: Tensor, product: Tensor, kept: int) -> Tensor:
    """Strongest directions of ``C Q (Q^T C Q)^-1 (C Q)^T``, each scaled by its singular value, from Q and ``C Q``.

    ``Q^T C Q`` is scaled to unit diagonal first: the columns of Q are nearly eigenvectors, whose eigenvalues may span
    many orders of magnitude without being uncertain. Only the span of Q matters, so rounding in it does no harm.

    Args:
        basis: Q, independent columns, shape ``(dim, p)``.
        product: ``C Q``, shape ``(dim, p)``.
        kept: Most rows to return.

    Returns:
        Shape ``(<= kept, dim)``, descending, fp32.
    """
    wide = wide_dtype(basis.device)
    z = product.to(wide)
    core = basis.T.to(wide) @ z
    core = (core + core.T) / 2
    scale = core.diagonal().clamp_min(0)
    scale = torch.where(scale > EPS**2 * scale.max(), scale, float("inf")).rsqrt()
    core = scale[:, None] * core * scale
    factor, info = torch.linalg.cholesky_ex(core)
    if int(info) == 0 and float(factor.diagonal().min()) > _DEPENDENT**0.5:
        whiten = torch.linalg.solve_triangular(factor, torch.diag(scale), upper=False).T
    else:
        values, vectors = torch.linalg.eigh(core)
        sound = values > _DEPENDENT
        whiten = scale[:, None] * vectors[:, sound] * values[sound].rsqrt()
    values, rotation = torch.linalg.eigh(whiten.T @ (z.T @ z) @ whiten)
    values, rotation = values.flip(0)[:kept], rotation.flip(1)[:, :kept]
    strong = values > EPS**2 * values[:1]
    return ((whiten @ rotation[:, strong]).T.to(product.dtype) @ product.T).contiguous()
