"""How much a decomposition loses when it sees only some of the tokens: from a few hundred of them."""

from __future__ import annotations

import torch
from torch import Tensor

from eva_lightning.svd.eigensolver import OVERSAMPLING, gaussian, orthonormal_columns
from eva_lightning.svd.inputs import full_precision, token_mean, wide_dtype


@full_precision
def token_noise(tokens: Tensor, k: int) -> float:
    """Share of the captured variance that n tokens drawn at random lose, times n: to first order it is constant / n.

    A covariance C estimated from n tokens x differs from the true one by a noise E. Its top k eigenvectors v_i then
    lose ``sum_{i<=k<j} E_ij**2 / (lambda_i - lambda_j)``, and ``E_ij**2`` is on average ``(x.v_i)**2 (x.v_j)**2 / n``.
    With ``lambda_j`` small beside ``lambda_i`` that is the mean over tokens of (leverage among the top k) times
    (what is outside them), over the variance inside, by n. For normal tokens it is ``k (1 - rho) / rho`` with rho the
    share of variance inside; heavy tails, where the same tokens are large inside and outside, raise it.

    Args:
        tokens: Shape ``(n, dim)`` with n a few times k; those of the layer's first minibatch.
        k: Components wanted.

    Returns:
        That constant; 0 when nothing varies or the values are not finite.
    """
    x = tokens.float()
    x = x - token_mean(x)
    p = min(k + OVERSAMPLING, x.shape[1])
    basis = orthonormal_columns(x.T @ (x @ gaussian(x.shape[1], p, x.device)), torch.float32)
    inside = x @ basis
    gram = (inside.T @ inside).to(wide_dtype(x.device))
    if not bool(torch.isfinite(gram).all()) or float(gram.diagonal().sum()) <= 0:
        return 0.0
    values, rotation = torch.linalg.eigh(gram)
    squares = (inside @ rotation[:, -k:].float()).square()
    leverage = len(x) * (squares / values[-k:].clamp_min(1e-12 * float(values[-1])).float()).sum(dim=1)
    outside = (x.square().sum(dim=1) - squares.sum(dim=1)).clamp_min(0)
    return float((leverage * outside).sum() / squares.sum())
