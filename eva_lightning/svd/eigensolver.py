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
_ROUGH = 1e-4
_ROUNDING = 1e-7
_MAX_ITERATIONS = 100
_NARROW = 96
# Up to here, and where products cost no message, one dense fp64 eigh (4 ms at 192) is faster than iterating to 1e-6.
_DENSE = 256


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


def orthonormal_columns(z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Orthonormal basis of the span of the columns of `z`, by Cholesky-QR.

    The first m columns of the basis span what the first m columns of `z` span. Columns are scaled to unit length
    first: after a Rayleigh-Ritz rotation they are nearly orthogonal and differ mainly in length, so the Gram matrix is
    then well conditioned. Rank-deficient input falls back to Householder QR, which fills up with arbitrary orthonormal
    columns.

    Args:
        z: Shape ``(..., dim, p)`` with p <= dim.
        dtype: Of the last product; fp64 by default, and fp32 where orthogonal to about 1e-5 is enough.
    """
    norms = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
    z = z / norms.clamp_min(torch.finfo(z.dtype).tiny)
    wide = z.to(wide_dtype(z.device))
    factor, info = torch.linalg.cholesky_ex(wide.mT @ wide)
    usable = (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) > 1e-3)
    if not bool(usable.any()):
        return torch.linalg.qr(z).Q
    identity = torch.eye(z.shape[-1], dtype=wide.dtype, device=z.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    basis = (wide @ inverse if dtype is None else z.to(dtype) @ inverse.to(dtype)).to(z.dtype)
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
        basis: Orthonormal columns, of which the first k are the eigenvectors and the rest are the best estimates of the
            next ones, shape ``(count, dim, iterated_columns(dim, k))``, fp32.
        start_variance: ``tr(V C V^T)`` of the first k columns V of the warm start, shape ``(count,)``; NaN where there
            was none.
    """

    values: Tensor
    basis: Tensor
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
        Eigenvalues ``(k,)``, descending, fp64, and a basis that starts with the eigenvectors, see
        :class:`Eigenpairs`.
    """
    pairs = batched_top_eigenpairs(lambda q, _: apply(q[0])[None], [start], dim, k, device)
    return pairs.values[0], pairs.basis[0]


def batched_top_eigenpairs(
    apply: Callable[[Tensor, list[int]], Tensor],
    starts: Sequence[Tensor | None],
    dim: int,
    k: int,
    device: torch.device,
    tolerance: float = CAPTURED_TOLERANCE,
    agree: Callable[[Tensor], Tensor] = lambda done: done,
    dense: bool = True,
) -> Eigenpairs:
    """Top k eigenpairs of positive semi-definite matrices of equal width, by subspace iteration with Rayleigh-Ritz.

    k + 16 columns are iterated (all of a narrow matrix, for which one Rayleigh-Ritz step is exact). A matrix is done
    when the geometric extrapolation of the Ritz values says that less than a fifth of `tolerance` of the sum of the top
    k is missing, which keeps the captured variance above ``1 - tolerance`` (tested over flat, decaying, spiked and
    rank-deficient spectra), and less than 1e-4 of every tail ``sum_{i<=j<=k}``, so that one dominating direction cannot
    hide that those below it are still unresolved. From a tolerance of 1e-4 on, when only the sum matters, the tails are
    not checked, and the extrapolation is trusted from the second product on. Directions of nearly equal eigenvalues
    may stay rotated among each other: that changes no captured variance.

    Args:
        apply: ``apply(q, active)`` multiplies the matrices numbered `active` with q, shape ``(len(active), dim, p)``.
        starts: Per matrix a warm start, shape ``(dim, m)``, orthonormal columns, or None. Random columns are added up
            to k + 16: a warm basis alone is blind to directions orthogonal to it, such as those of a class it has not
            seen, so give more than k columns only if they come from the same matrix.
        dim: Width of the matrices.
        k: Number of eigenpairs, k <= dim.
        device: Where to work.
        tolerance: Share of the captured variance that may be missing.
        agree: Maps the flags of which matrices are done to flags that are the same on all ranks.
        dense: Products with `dim` columns are no dearer than their flops, so narrow matrices need no iteration.
    """
    kept, wide, count = iterated_columns(dim, k), wide_dtype(device), len(starts)
    rough = tolerance >= _ROUGH
    p = dim if dense and not rough and dim <= _DENSE else kept
    q = _first_basis(starts, dim, p, device)
    if not rough and p < dim:
        q = orthonormal_columns(q)
    values = torch.empty(count, k, dtype=wide, device=device)
    basis = torch.empty(count, dim, kept, device=device)
    tails = gains = torch.zeros(count, k, dtype=wide, device=device)
    active = list(range(count))
    for iteration in range(_MAX_ITERATIONS):
        z = apply(q, active)
        if iteration == 0:
            start_variance = _start_variance(q, z, starts, k)
            if rough and p < dim:
                # Not worth a Ritz step: what the start captures bounds the sum of the top k from below.
                tails = gains = tails + start_variance.nan_to_num(0.0)[:, None]
                q = orthonormal_columns(z, z.dtype)
                continue
        exact = z.dtype if rough and p < dim else wide
        h = (q.mT.to(exact) @ z.to(exact)).to(wide)
        ritz_values, rotation = torch.linalg.eigh((h + h.mT) / 2)
        ritz_values, rotation = ritz_values.flip(1), rotation.flip(2).to(q.dtype)
        previous, tails = tails, ritz_values[:, :k].flip(1).cumsum(1).flip(1)
        previous_gains, gains = gains, tails - previous
        done = _converged(iteration, tails, gains, previous_gains, ritz_values[:, :1], tolerance)
        done = agree(done) if p < dim and iteration + 1 < _MAX_ITERATIONS else torch.ones_like(done)
        finished = [i for i, flag in zip(active, done.tolist(), strict=True) if flag]
        if finished:
            values[finished] = ritz_values[done, :k].clamp_min(0)
            basis[finished] = orthonormal_columns(q[done] @ rotation[done][..., :kept])
            if len(finished) == len(active):
                break
            active = [i for i, flag in zip(active, done.tolist(), strict=True) if not flag]
            z, rotation, tails, gains = z[~done], rotation[~done], tails[~done], gains[~done]
        q = orthonormal_columns(z @ rotation, z.dtype if rough else None)
    return Eigenpairs(values, basis, start_variance)


def _first_basis(starts: Sequence[Tensor | None], dim: int, p: int, device: torch.device) -> Tensor:
    """Warm starts and nearly orthonormal random columns orthogonal to them, shape ``(len(starts), dim, p)``."""
    if p == dim:
        return torch.eye(dim, device=device).repeat(len(starts), 1, 1)  # products with it round nothing
    q = gaussian(dim, p, device).div_(dim**0.5).repeat(len(starts), 1, 1)
    for width in {start.shape[1] for start in starts if start is not None}:
        chosen = [i for i, start in enumerate(starts) if start is not None and start.shape[1] == width]
        warm = torch.stack([start for start in starts if start is not None and start.shape[1] == width])[..., :p]
        fresh = q[chosen, :, warm.shape[2] :]
        q[chosen] = torch.cat([warm, fresh - warm @ (warm.mT @ fresh)], dim=2)
    return q


def _start_variance(q: Tensor, z: Tensor, starts: Sequence[Tensor | None], k: int) -> Tensor:
    """``tr(V^T C V)`` of the first k columns V of every start, from ``z = C q`` where q starts with V or is the
    identity; NaN without V.
    """
    variance = torch.full((len(starts),), float("nan"), dtype=wide_dtype(z.device), device=z.device)
    for i, start in enumerate(starts):
        if start is not None:
            v = start[:, :k]
            product = z[i] @ v.to(z.dtype) if q.shape[1] == q.shape[2] else z[i, :, : v.shape[1]]
            variance[i] = (v * product).to(variance.dtype).sum()
    return variance


def _converged(
    iteration: int, tails: Tensor, gains: Tensor, previous_gains: Tensor, largest: Tensor, tolerance: float
) -> Tensor:
    """Per matrix, from the tails of its Ritz values and their last two gains, all of shape ``(count, k)``."""
    # A gain that shrinks by the factor q per step leaves gain * q / (1 - q) to come. This early, a small q is doubtful.
    rate = gains / previous_gains.clamp_min(1e-300)
    if tolerance >= _ROUGH:
        # Measured on ViT activations, a step from a warm start leaves less than a tenth of its gain.
        rate = rate[:, 0].clamp(0.1, 1.0)
        missing = gains[:, 0] * rate / (1 - rate).clamp_min(1e-12)
        return (missing <= tolerance * tails[:, 0]) & (iteration >= 1)
    rate = rate.clamp(0.5, 1.0)
    missing = gains * rate / (1 - rate).clamp_min(1e-12)
    allowed = torch.full_like(tails, _TAIL_TOLERANCE)
    allowed[:, 0] = tolerance / 5
    resolved = (missing <= allowed * tails) | (gains <= _ROUNDING * largest)
    return resolved.all(dim=1) & (iteration >= 2)
