"""Top eigenpairs of a covariance that is only available as a product with tall matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eva_lightning.svd.inputs import wide_dtype

OVERSAMPLING = 16
CAPTURED_TOLERANCE = 1e-6
_TAIL_TOLERANCE = 1e-4
_ROUNDING = 1e-7
_MAX_ITERATIONS = 100
_NARROW = 96


def canonical_sign(rows: Tensor) -> Tensor:
    """Flip rows so that the entry of largest magnitude of each is positive.

    Args:
        rows: Shape ``(m, dim)``.
    """
    if rows.shape[0] == 0:
        return rows
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -rows, rows)


def gaussian(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """The standard normal matrix of `seed`, the same on every device, drawn without touching global random state."""
    generator = torch.Generator().manual_seed(0x5EED + seed)
    return torch.randn(rows, columns, generator=generator).to(device)


def orthonormal_columns(z: Tensor) -> Tensor:
    """Orthonormal basis of the span of the columns of `z`, by Cholesky-QR.

    The first m columns of the basis span what the first m columns of `z` span. Columns are scaled to unit length
    first: after a Rayleigh-Ritz rotation they are nearly orthogonal and differ mainly in length, so the Gram matrix is
    then well conditioned. Rank-deficient input falls back to Householder QR, which fills up with arbitrary orthonormal
    columns.

    Args:
        z: Shape ``(..., dim, p)`` with p <= dim.
    """
    norms = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
    z = z / norms.clamp_min(torch.finfo(z.dtype).tiny)
    wide = z.to(wide_dtype(z.device))
    factor, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    usable = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) > 1e-3)
    if not bool(usable.any()):
        return torch.linalg.qr(z).Q
    identity = torch.eye(z.shape[-1], dtype=wide.dtype, device=z.device).expand_as(factor)
    basis = (wide @ torch.linalg.solve_triangular(factor, identity, upper=False).mT).to(z.dtype)
    if not bool(usable.all()):
        basis[~usable] = torch.linalg.qr(z[~usable]).Q
    return basis


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


def iterated_columns(dim: int, k: int) -> int:
    """Columns that subspace iteration works with: k + 16, or all where that is not much fewer."""
    p = k + OVERSAMPLING
    return dim if dim <= max(_NARROW, 2 * p) else p


@dataclass(frozen=True)
class Eigenpairs:
    """Top eigenpairs of several matrices of equal width.

    Attributes:
        values: Descending, shape ``(count, k)``, fp64.
        vectors: Orthonormal columns, shape ``(count, dim, k)``, fp32.
        start_variance: ``tr(V C V^T)`` of the warm start V, shape ``(count,)``; NaN where there was none.
    """

    values: Tensor
    vectors: Tensor
    start_variance: Tensor


def top_eigenpairs(
    apply: Callable[[Tensor], Tensor], dim: int, k: int, device: torch.device, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`batched_top_eigenpairs` of one matrix, to the default tolerance.

    Args:
        apply: Maps ``(dim, p)`` fp32 to the matrix times it.
        dim: Width of the matrix.
        k: Number of eigenpairs, k <= dim.
        device: Where to work.
        start: Warm start, shape ``(dim, m)``, orthonormal columns.

    Returns:
        Eigenvalues ``(k,)``, descending, fp64, and eigenvectors ``(dim, k)``, fp32.
    """
    pairs = batched_top_eigenpairs(lambda q, _: apply(q[0])[None], [start], dim, k, device)
    return pairs.values[0], pairs.vectors[0]


def batched_top_eigenpairs(
    apply: Callable[[Tensor, list[int]], Tensor],
    starts: Sequence[Tensor | None],
    dim: int,
    k: int,
    device: torch.device,
    tolerance: float = CAPTURED_TOLERANCE,
    agree: Callable[[Tensor], Tensor] = lambda done: done,
) -> Eigenpairs:
    """Top k eigenpairs of positive semi-definite matrices of equal width, by subspace iteration with Rayleigh-Ritz.

    k + 16 columns are iterated (all of a narrow matrix, for which one Rayleigh-Ritz step is exact). A matrix is done
    when the geometric extrapolation of the Ritz values says that less than a fifth of `tolerance` of the sum of the top
    k is missing, which keeps the captured variance above ``1 - tolerance`` (tested over flat, decaying, spiked and
    rank-deficient spectra). At the default tolerance, also less than 1e-4 of every tail ``sum_{i<=j<=k}`` must be
    missing, so that one dominating direction cannot hide that those below it are still unresolved. Directions of nearly
    equal eigenvalues may stay rotated among each other: that changes no captured variance.

    Args:
        apply: ``apply(q, active)`` multiplies the matrices numbered `active` with q, shape ``(len(active), dim, p)``.
        starts: Per matrix a warm start, shape ``(dim, m)``, orthonormal columns, or None. Fresh random columns are
            always added: a warm basis alone is blind to directions orthogonal to it, such as those of a class it has
            not seen.
        dim: Width of the matrices.
        k: Number of eigenpairs, k <= dim.
        device: Where to work.
        tolerance: Share of the captured variance that may be missing.
        agree: Maps the flags of which matrices are done to flags that are the same on all ranks.
    """
    p, wide, count = iterated_columns(dim, k), wide_dtype(device), len(starts)
    if p == dim:
        q = torch.eye(dim, device=device).repeat(count, 1, 1)  # products with it round nothing
    else:
        q = gaussian(dim, p, device).repeat(count, 1, 1)
        for basis, start in zip(q, starts, strict=True):
            if start is not None:
                basis[:, : min(start.shape[1], k)] = start[:, :k]
        q = orthonormal_columns(q)
    values = torch.empty(count, k, dtype=wide, device=device)
    vectors = torch.empty(count, dim, k, device=device)
    start_variance = torch.full((count,), float("nan"), dtype=wide, device=device)
    tails = gains = torch.zeros(count, k, dtype=wide, device=device)
    active = list(range(count))
    for iteration in range(_MAX_ITERATIONS):
        z = apply(q, active)
        h = q.mT.to(wide) @ z.to(wide)
        if iteration == 0:
            for i, start in enumerate(starts):
                if start is None:
                    continue
                if p == dim:
                    v = start[:, :k].to(wide)
                    start_variance[i] = (v * (h[i] @ v)).sum()
                else:
                    start_variance[i] = h[i].diagonal()[: min(start.shape[1], k)].sum()
        ritz_values, rotation = torch.linalg.eigh((h + h.mT) / 2)
        ritz_values, rotation = ritz_values.flip(1), rotation.flip(2).to(q.dtype)
        previous, tails = tails, ritz_values[:, :k].flip(1).cumsum(1).flip(1)
        previous_gains, gains = gains, tails - previous
        done = _converged(iteration, tails, gains, previous_gains, ritz_values[:, :1], tolerance)
        done = agree(done) if p < dim and iteration + 1 < _MAX_ITERATIONS else torch.ones_like(done)
        finished = [i for i, flag in zip(active, done.tolist(), strict=True) if flag]
        if finished:
            values[finished] = ritz_values[done, :k].clamp_min(0)
            vectors[finished] = orthonormal_columns(q[done] @ rotation[done, :, :k])
            if len(finished) == len(active):
                break
            active = [i for i, flag in zip(active, done.tolist(), strict=True) if not flag]
            z, rotation, tails, gains = z[~done], rotation[~done], tails[~done], gains[~done]
        q = orthonormal_columns(z @ rotation)
    return Eigenpairs(values, vectors, start_variance)


def _converged(
    iteration: int, tails: Tensor, gains: Tensor, previous_gains: Tensor, largest: Tensor, tolerance: float
) -> Tensor:
    """Per matrix, from the tails of its Ritz values and their last two gains, all of shape ``(count, k)``."""
    rough = tolerance > 10 * CAPTURED_TOLERANCE
    if iteration < (1 if rough else 2):
        return torch.zeros(len(tails), dtype=torch.bool, device=tails.device)
    # A gain that shrinks by the factor q per step leaves gain * q / (1 - q) to come; q < 1/2 is not trusted so early.
    rate = (gains / previous_gains.clamp_min(1e-300)).clamp(0.5, 1.0)
    missing = gains * rate / (1 - rate).clamp_min(1e-12)
    allowed = torch.full_like(tails, float("inf") if rough else _TAIL_TOLERANCE)
    allowed[:, 0] = tolerance / 5
    return ((missing <= allowed * tails) | (gains <= _ROUNDING * largest)).all(dim=1)
