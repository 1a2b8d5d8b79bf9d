"""Starts along the gradient of the training loss: LoRA-GA, LoRA-One, LoRA-DA and GoRA, as in their authors' code.

W is a layer's weight (m outputs, n inputs), G the mean gradient of the loss with respect to it, s the scaling of the
adapter. A has shape (rank, n), B (m, rank). Decompositions are dense and exact where the authors' are randomised; they
take a few matrices of the weight's shape, LoRA-DA also four of (n, n), in float64, for one layer at a time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eva_lightning.adapters import AdapterLayer
from eva_lightning.adapters.base_weight_init import as_linear

if TYPE_CHECKING:
    from eva_lightning.methods.start_inputs import Given, Means

LORA_GA_GAMMA = 16.0
"""LoRA-GA's γ (``stable_gamma`` of the authors' configuration; PEFT's default too)."""

LORA_ONE_GAMMA = 128.0
"""LoRA-One's γ (the authors' ``conf/init/gradient.yaml``)."""

LORA_DA_GAMMA, LORA_DA_BETA, LORA_DA_DAMPING = 1024.0, 0.03, 1e-6
"""LoRA-DA's γ, β and the ridge on both factors of the Fisher information (the authors' ``conf/lora_da.yaml``)."""

GORA_GAMMA = 0.05
"""GoRA's γ: the first step is one of gradient descent at this learning rate (``--gora-lr`` of the authors' runs)."""

GORA_RANKS = (0.5, 4.0)
"""GoRA's smallest and largest rank over the reference rank (the authors' runs: 4 and 32 at 8)."""


def lora_ga(layer: AdapterLayer, means: Means, given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-GA (Wang et al., 2024, section 3 and Algorithm 1): A and B from different singular vectors of the gradient.

    A is the first ``rank`` right singular vectors of G, B the next ``rank`` left ones, both times
    ``m**(1/4) / sqrt(γ)``; singular values are left out. What that makes of W is ``W - s B A``. The authors' scale s is
    rsLoRA's (their instructions: ``peft.use_rslora=True``).
    """
    gradient = as_linear(layer, means["gradient"])
    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    scale = len(gradient) ** 0.25 / math.sqrt(LORA_GA_GAMMA)
    return vh[: layer.rank] * scale, u[:, layer.rank : 2 * layer.rank] * scale


def lora_one(layer: AdapterLayer, means: Means, given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-One (Zhang et al., 2025, Algorithm 1): the best step of rank r of gradient descent.

    With ``U S V^T = svd(-G)``, ``B = U_r sqrt(S_r / S_1) / sqrt(γ)`` and ``A = sqrt(S_r / S_1) V_r^T / sqrt(γ)``:
    the division by the largest singular value is in the authors' code, not in the paper. W is not changed: the
    function moves.
    """
    u, s, vh = torch.linalg.svd(-as_linear(layer, means["gradient"]).float(), full_matrices=False)
    root = (s[: layer.rank] / s[0]).sqrt() / math.sqrt(LORA_ONE_GAMMA)
    return root[:, None] * vh[: layer.rank], u[:, : layer.rank] * root


def lora_da(layer: AdapterLayer, means: Means, given: Given) -> tuple[Tensor, Tensor]:
    """LoRA-DA (Zhang et al., 2025, Algorithm 1): the directions of least expected distance to the target weights.

    With Z the second moment of inputs and y the mean square of output gradients, both plus 1e-6, and N training
    samples: ``D = -Z^-1 G^T diag(1/y)`` over its largest singular value σ,
    ``Ω = -D D^T + β (Σ 1/y) / (N σ²) Z^-1``, Q the ``rank`` eigenvectors of Ω's smallest eigenvalues,
    ``A = Q^T / sqrt(γ)`` and ``B = (Q^T D)^T / sqrt(γ)``. W is not changed: the function moves.

    The authors send samples through the model one by one. Here they come in minibatches, and output gradients are
    multiplied by the number of samples. The same is found where the loss is the mean of the samples' own losses and the
    model does not mix samples (no batch norm in training mode); dropout draws other masks. Where a sample's weight in
    the loss depends on its number of tokens, samples count by that weight here and alike there.
    """
    gradient, moment, squares = (_double(means[name]) for name in ("gradient", "inputs", "output_gradients"))
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    factor = torch.linalg.cholesky((moment + moment.T) / 2 + LORA_DA_DAMPING * identity)
    inverse = 1 / (squares + LORA_DA_DAMPING)
    step = -torch.cholesky_solve(as_linear(layer, gradient).T, factor) * inverse
    largest = torch.linalg.matrix_norm(step, ord=2)
    step = step / largest
    variance = LORA_DA_BETA * inverse.sum() / (given.training_samples * largest**2)
    guidance = variance * torch.cholesky_inverse(factor) - step @ step.T
    directions = torch.linalg.eigh((guidance + guidance.T) / 2).eigenvectors[:, : layer.rank]
    scale = 1 / math.sqrt(LORA_DA_GAMMA)
    return directions.T * scale, (directions.T @ step).T * scale


def gora_ranks(layers: Mapping[str, AdapterLayer], means: Mapping[str, Means], given: Given) -> dict[str, int]:
    """GoRA (He et al., 2025, section 3.2): more rank where ``|W * G|`` is large.

    A layer's share of the importances ``mean |W * G|`` is its share of the budget ``r Σ sqrt(m + n)``; what it buys at
    ``sqrt(m + n)`` each, rounded down, is its rank, between r/2 and 4 r and at most the weight's smaller side. The sum
    is not that of uniform ranks exactly.
    """
    weights: dict[str, Any] = {name: layer.base.weight for name, layer in layers.items()}
    importances = {
        name: float((weight.detach().float() * means[name]["gradient"].float()).abs().mean())
        for name, weight in weights.items()
    }
    total = sum(importances.values())
    prices = {name: math.sqrt(sum(weight.shape)) for name, weight in weights.items()}
    reference = int(next(iter(layers.values())).config.r)
    budget = reference * sum(prices.values())
    least, most = max(1, int(GORA_RANKS[0] * reference)), int(GORA_RANKS[1] * reference)
    return {
        name: min(max(int(round(budget * importances[name] / total) // prices[name]), least), most, *weight.shape)
        for name, weight in weights.items()
    }


def gora(layer: AdapterLayer, means: Means, given: Given) -> tuple[Tensor, Tensor]:
    """GoRA (He et al., 2025, section 3.3): A random, B the part of a gradient step that A can express.

    A is Kaiming-uniform as LoRA's, ``B = -(γ sqrt(n / rank) / s) G A^T (A A^T + 1e-8)^-1``. The factor before G is what
    the authors' code makes of ``--gora-scale-by-lr``, which all their runs set: ``s B A`` has about the norm of ``γ G``
    whatever the rank, α and scaling. W is not changed: the function moves.
    """
    gradient = _double(as_linear(layer, means["gradient"]))
    inputs, scaling = gradient.shape[1], layer.module.scaling[layer.adapter]
    generator = torch.Generator().manual_seed(given.seed + zlib.crc32(layer.name.encode()))
    bound = 1 / math.sqrt(inputs)
    a = torch.empty(layer.rank, inputs, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    a = a.to(gradient.device)
    gram = a @ a.T + 1e-8 * torch.eye(layer.rank, dtype=a.dtype, device=a.device)
    step = GORA_GAMMA * math.sqrt(inputs / layer.rank) / scaling
    return a, -step * torch.linalg.solve(gram, a @ gradient.T).T


def _double(matrix: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return matrix.to("cpu" if matrix.device.type == "mps" else matrix.device, torch.float64)
