"""Top eigenpairs of a covariance that is only available as a product with tall matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eva_lightning.svd.inputs import wide_dtype

OVERSAMPLING = 16
CAPTURED_TOLERANCE = 1e-6
_ESTIMATE_TOLERANCE = CAPTURED_TOLERANCE / 5
_TAIL_TOLERANCE = 1e-4
_ROUNDING = 1e-7
_MAX_ITERATIONS = 100


def canonical_sign(rows: Tensor) -> Tensor:
    """Flip rows so that the entry of largest magnitude of each is positive.

    Args:
        rows: Shape ``(m, dim)``.
    """
    if rows.shape[0] == 0:
        return rows
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -rows, rows)


def gaussian(rows: int, columns: int, device: torch.device) -> Tensor:
    """The same standard normal matrix on every call and device, drawn without touching global random state."""
    generator = torch.Generator().manual_seed(0x5EED)
    return torch.randn(rows, columns, generator=generator).to(device)


def orthonormal_columns(z: Tensor) -> Tensor:
    """Orthonormal basis of the span of the columns of `z`, by Cholesky-QR.

    Columns are scaled to unit length first: after a Rayleigh-Ritz rotation they are nearly orthogonal and differ
    mainly in length, so the Gram matrix is then well conditioned. Rank-deficient input falls back to Householder QR,
    which fills up with arbitrary orthonormal columns.

    Args:
        z: Shape ``(dim, p)`` with p <= dim.
    """
    norms = torch.linalg.vector_norm(z, dim=0)
    z = z / norms.clamp_min(torch.finfo(z.dtype).tiny)
    wide = z.to(wide_dtype(z.device))
    factor, info = torch.linalg.cholesky_ex(wide.T @ wide)
    usable = (info == 0) & (factor.diagonal().min() > 1e-3)
    if not bool(usable):
        return torch.linalg.qr(z).Q
    return torch.linalg.solve_triangular(factor, wide.T, upper=False).T.to(z.dtype)


def complete_rows(rows: Tensor, k: int) -> Tensor:
    """Append arbitrary, deterministic orthonormal rows until there are k.

    Args:
        rows: Orthonormal rows, shape ``(m, dim)`` with m <= k <= dim.
    """
    missing = k - rows.shape[0]
    if missing <= 0:
        return rows
    basis = torch.cat([rows, gaussian(missing, rows.shape[1], rows.device)]).to(wide_dtype(rows.device))
    q = torch.linalg.qr(basis.T).Q.T.to(rows.dtype)
    return torch.cat([rows, q[rows.shape[0] :]])


def top_eigenpairs(
    apply: Callable[[Tensor], Tensor], dim: int, k: int, device: torch.device, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Top k eigenpairs of a positive semi-definite matrix by subspace iteration with Rayleigh-Ritz.

    k + 16 columns are iterated. The iteration stops when the geometric extrapolation of the Ritz values says that less
    than 2e-7 of the sum of the top k is missing, which keeps the captured variance above 1 - 1e-6 (tested over flat,
    decaying, spiked and rank-deficient spectra), and less than 1e-4 of every tail ``sum_{i<=j<=k}``, so that one
    dominating direction cannot hide that those below it are still unresolved. Directions of nearly equal eigenvalues
    may stay rotated among each other: that changes no captured variance.

    Args:
        apply: Maps ``(dim, p)`` fp32 to the matrix times it.
        dim: Width of the matrix.
        k: Number of eigenpairs, k <= dim.
        device: Where to work.
        start: Warm start, shape ``(dim, m)``, orthonormal columns. Fresh random columns are always added: a warm basis
            alone is blind to directions orthogonal to it, such as those of a class it has not seen.

    Returns:
        Eigenvalues ``(k,)``, descending, fp64, and eigenvectors ``(dim, k)``, fp32.
    """
    p = min(k + OVERSAMPLING, dim)
    q = gaussian(dim, p, device)
    if start is not None:
        warm = min(start.shape[1], k)
        q = torch.cat([start[:, :warm], q[:, warm:]], dim=1)
    q = orthonormal_columns(q)
    wide = wide_dtype(device)
    tails = gains = torch.zeros(k, dtype=wide, device=device)
    for iteration in range(_MAX_ITERATIONS):
        z = apply(q)
        h = q.T.to(wide) @ z.to(wide)
        ritz_values, rotation = torch.linalg.eigh((h + h.T) / 2)
        ritz_values, rotation = ritz_values.flip(0), rotation.flip(1).to(q.dtype)
        previous, tails = tails, ritz_values[:k].flip(0).cumsum(0).flip(0)
        previous_gains, gains = gains, tails - previous
        if iteration >= 2 and _converged(tails, gains, previous_gains, float(ritz_values[0])):
            break
        if iteration + 1 < _MAX_ITERATIONS:
            q = orthonormal_columns(z @ rotation)
    return ritz_values[:k].clamp_min(0), orthonormal_columns(q @ rotation[:, :k])


def _converged(tails: Tensor, gains: Tensor, previous_gains: Tensor, largest: float) -> bool:
    # A gain that shrinks by the factor q per step leaves gain * q / (1 - q) to come; q < 1/2 is not trusted so early.
    rate = (gains / previous_gains.clamp_min(1e-300)).clamp(0.5, 1.0)
    missing = gains * rate / (1 - rate).clamp_min(1e-12)
    tolerance = torch.full_like(tails, _TAIL_TOLERANCE)
    tolerance[0] = _ESTIMATE_TOLERANCE
    return bool(((missing <= tolerance * tails) | (gains <= _ROUNDING * largest)).all())
