"""Low-memory streaming SVD for wide layers: a randomized sketch of a few rows, updated in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_lightning.svd.factored import Factor, FactoredSVD, united
from eva_lightning.svd.inputs import require_finite, squared_norm, token_mean, wide_dtype
from eva_lightning.svd.subspace import gaussian, orthonormal_columns

FRESH = 16
_EPS = torch.finfo(torch.float32).eps


class SketchSVD(FactoredSVD):
    """Randomized SVD of a stream (Halko et al. 2011, warm-started): as :class:`IncrementalSVD`, but without an SVD of
    the batch, and keeping 2k directions so that what is truncated is far from the k that are wanted.

    With R the stacked rows ``[diag(sigma) V; X - x; sqrt(n b / (n + b)) (m - x)]`` and Q the 2k directions kept so far
    plus 16 fresh Gaussian ones, an update takes an orthonormal basis U of ``R Q`` and keeps the top 2k singular
    directions of ``U^T R``: two products of the batch with 2k + 16 columns instead of one with `dim` columns. Since
    ``R^T U U^T R`` is below ``R^T R``, singular values are underestimated, never overestimated; the total variance and
    the mean are exact. Fresh directions let the sketch see what is orthogonal to everything before.

    State and messages between ranks are O(k * dim). What is truncated is lost, so the result depends slightly on the
    order of the batches.

    Args:
        dim: Width of the inputs.
        k: Components wanted, 1 <= k <= dim.
        device: Where the state lives; None: where the first batch is.

    Raises:
        ValueError: k outside [1, dim].
    """

    @staticmethod
    def kept(dim: int, k: int) -> int:
        """Rows of the sketch."""
        return min(2 * k, dim)

    def _absorb(self, factor: Factor | None, tokens: Tensor) -> Factor:
        kept, n = self.kept(self.dim, self.k), len(tokens)
        wide = wide_dtype(tokens.device)
        # Shifting by the running mean leaves a batch mean small enough to be taken out of the products instead.
        shift = token_mean(tokens) if factor is None else factor.mean.to(tokens.dtype)
        shifted = (tokens - shift).float()
        drift = shifted.sum(dim=0).to(wide) / n
        squares = squared_norm(shifted)
        require_finite(float(squares))
        mean, total = shift.to(wide) + drift, max(float(squares - n * drift.square().sum()), 0.0)
        count = n
        head = shifted[:0]
        if factor is not None:
            correction, mean, count, total = united(factor, mean, n, total)
            head = torch.cat([factor.scaled, correction[None]])
        columns = min(kept + FRESH, self.dim)
        if len(head) + n <= columns:
            rows = torch.cat([head, shifted - drift.float()])
        else:
            known = shifted[:0] if factor is None else _directions(factor.scaled)
            fresh = gaussian(self.dim, columns - len(known), tokens.device, seed=count)
            rows = _project(head, shifted, drift.float(), torch.cat([known.T, fresh], dim=1))
            if factor is None:
                # Nothing to start from: one more pass over the first batch is a power iteration.
                rows = _project(head, shifted, drift.float(), _directions(rows).T)
        return Factor(_strongest(rows, kept), mean, count, total)


def _project(head: Tensor, batch: Tensor, drift: Tensor, q: Tensor) -> Tensor:
    """``U^T R`` for ``R = [head; batch - drift]`` and U an orthonormal basis of ``R q``.

    Args:
        head: Shape ``(m, dim)``.
        batch: Shape ``(n, dim)``.
        drift: Mean of the rows of `batch`, shape ``(dim,)``.
        q: Shape ``(dim, p)`` with p <= m + n.
    """
    m = len(head)
    u = orthonormal_columns(torch.cat([head @ q, batch @ q - drift @ q]))
    rows = u[m:].T @ batch
    rows.addr_(u[m:].sum(dim=0), drift, alpha=-1)
    return rows.addmm_(u[:m].T, head) if m else rows


def _directions(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _strongest(rows: Tensor, kept: int) -> Tensor:
    """Top right-singular vectors of `rows`, scaled by their singular values, by ``eigh`` of the small Gram matrix."""
    wide = rows.to(wide_dtype(rows.device))
    values, rotation = torch.linalg.eigh(wide @ wide.T)
    values, rotation = values.flip(0)[:kept], rotation.flip(1)[:, :kept]
    strong = values > _EPS**2 * values[0]
    return (rotation.T.to(rows.dtype) @ rows)[strong]
