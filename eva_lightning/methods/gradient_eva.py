"""Gradient-aware EVA, an experiment of this project: A along the directions in which the first updates are largest.

The paper's Theorem 3.2 takes the activations' principal directions for A, as they maximise the expected squared norm of
the gradient of B if gradients do not depend on activations. Here that is not assumed: with G_b the gradient of a
minibatch with respect to the weight, B = 0 and plain gradient descent, the first update of the weight is
``-lr * s**2 * G_b A^T A``, and the mean of its squared norm over minibatches is ``lr**2 * s**4 * tr(A M A^T)`` with
``M = E[G_b^T G_b]`` for orthonormal rows of A. docs/gradient-aware-eva.md has the derivation, and what it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from eva_lightning.adapters import AdapterLayer
from eva_lightning.adapters.base_weight_init import as_linear
from eva_lightning.ranks import redistribute_ranks
from eva_lightning.svd.eigensolver import canonical_sign, top_eigenpairs

if TYPE_CHECKING:
    from eva_lightning.methods.start_inputs import Given, Means


def first_update_directions(
    gradient: Tensor, moment: Tensor, minibatches_per_step: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k orthonormal directions of inputs in which first updates are largest, and their shares.

    They are the top eigenvectors of ``M = G^T G + (M_1 - G^T G) / n``: the second moment of the gradient of an
    optimizer step that averages n independent minibatches. With n = 1 it is M_1; for large n they become the right
    singular vectors of G, which is LoRA-GA's A.

    Args:
        gradient: G, the mean gradient over minibatches, shape ``(out, in)``.
        moment: M_1, the mean of ``G_b^T G_b`` over the same minibatches, shape ``(in, in)``, not all zero.
        minibatches_per_step: n.
        k: Directions wanted, at most ``in``.

    Returns:
        Directions, shape ``(k, in)``, orthonormal rows, fp32, and ``λ_j / tr M``, shape ``(k,)``, fp64, descending.
    """
    n = minibatches_per_step
    moment = moment.float() / n
    mean = gradient.float() * (1 - 1 / n) ** 0.5
    # gradients may be so small that their fourth powers have no place in fp32
    total = float(moment.diagonal().double().sum() + mean.double().square().sum())
    moment, mean = moment / total, mean / total**0.5

    def product(q: Tensor) -> Tensor:
        return moment.to(q) @ q + mean.to(q).T @ (mean.to(q) @ q)

    shares, basis = top_eigenpairs(product, len(moment), k, moment.device)
    return canonical_sign(basis[:, :k].T), shares.clamp_min(0)


def gradient_eva(layer: AdapterLayer, means: Means, given: Given) -> tuple[Tensor, None]:
    """A from :func:`first_update_directions`; B is zero, as in EVA."""
    return _directions(layer, means, given, layer.rank)[0], None


def gradient_eva_ranks(layers: Mapping[str, AdapterLayer], means: Mapping[str, Means], given: Given) -> dict[str, int]:
    """Ranks by the share of the expected squared update that directions carry, as EVA does by explained variance.

    The sum of ranks stays, a layer gets at most ``round(r * rho)``, and at least 1: a layer with any gradient keeps an
    adapter, where EVA may remove it.
    """
    caps = {name: min(round(layer.rank * given.rho), layer.in_features) for name, layer in layers.items()}
    shares = {name: _directions(layer, means[name], given, caps[name])[1] for name, layer in layers.items()}
    budget = sum(min(layer.rank, layer.in_features) for layer in layers.values()) - len(layers)
    more = redistribute_ranks({name: share[1:] for name, share in shares.items()}, budget)
    return {name: 1 + rank for name, rank in more.items()}


def _directions(layer: AdapterLayer, means: Means, given: Given, k: int) -> tuple[Tensor, Tensor]:
    gradient = as_linear(layer, means["gradient"])
    return first_update_directions(gradient, means["gradient_moment"], given.minibatches_per_step, k)
