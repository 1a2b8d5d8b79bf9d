"""From the SVD of a layer's inputs to its LoRA matrix A: EVA, and the ablations of the paper's section I."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eva_lightning.errors import InputError, check_choice

INITS = ("eva", "whiten", "lora-norm", "rotate", "permute", "minor", "redistribute")

LORA_ROW_NORM = 1 / math.sqrt(3)
"""Root mean square length of a row of LoRA's random A, whatever its width n: kaiming_uniform_ with a = sqrt(5) draws
entries from U(-1/sqrt(n), 1/sqrt(n)), whose variance is 1 / (3 n)."""


def initial_a(
    init: str,
    components: Tensor,
    singular_values: Tensor,
    explained_variance_ratio: Tensor,
    rank: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """LoRA's A for one layer.

    With V the first `rank` rows of `components`:

    - "eva": ``V`` (section 3.2).
    - "whiten": ``v_j / sqrt(xi_j)``, xi the explained-variance ratio: same directions, other scale. The paper says
      "the reciprocal of their eigenvalues"; the authors' vision code, which made Table 25, divides by the square root
      of the ratio, and that is followed here. PEFT and the authors' language code divide by the square root of the
      singular VALUE instead, which depends on the number of tokens and on the layer's scale. Components without
      variance keep unit length.
    - "lora-norm": ``V / sqrt(3)``: EVA's directions with rows as long as those of LoRA's random A (`LORA_ROW_NORM`),
      for what is due to directions and what to EVA's larger scale. In no paper.
    - "rotate": ``R V`` with R uniform over orthogonal ``rank x rank`` matrices (as the authors do): all norms and the
      span stay, every direction in it changes.
    - "permute": the entries of every column are shuffled over the rows, each column on its own (as the authors do):
      the Frobenius norm stays, directions and row norms do not.
    - "minor": ``V``, the caller passing the least-variance components (``ExactSVD.minor``) (Table 12).
    - "redistribute": Kaiming-uniform with ``a = sqrt(5)``, the default of LoRA: EVA's ranks without its directions.

    Args:
        init: One of `INITS`.
        components: Shape ``(k, dim)``, orthonormal rows, strongest first.
        singular_values: Shape ``(k,)``.
        explained_variance_ratio: Shape ``(k,)``.
        rank: Rows wanted, at most k (0 gives an empty matrix).
        generator: CPU generator for the random inits. None: a new one with seed 0, never the global state.

    Returns:
        Shape ``(rank, dim)``, fp32, on the device of `components`; never a view of it.

    Raises:
        InputError: Unknown `init`, or more rows wanted than there are components.
    """
    check_choice("init", init, INITS)
    if not 0 <= rank <= len(components):
        raise InputError(f"the rank must be between 0 and the {len(components)} components held, got {rank}")
    if not len(components) == len(singular_values) == len(explained_variance_ratio):
        counts = f"{len(components)}, {len(singular_values)} and {len(explained_variance_ratio)}"
        raise InputError(f"components, singular values and ratios must be equally many, got {counts}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    v = components[:rank].detach().to(dtype=torch.float32, copy=True)
    if rank == 0 or init in ("eva", "minor"):
        return v
    if init == "whiten":
        return v / _whitening_scale(explained_variance_ratio[:rank]).to(v.device)[:, None]
    if init == "lora-norm":
        return v * LORA_ROW_NORM
    if init == "rotate":
        return random_rotation(rank, generator).to(v.device) @ v
    if init == "permute":
        order = torch.rand(v.shape, generator=generator).argsort(dim=0)
        return v.gather(0, order.to(v.device))
    bound = 1 / math.sqrt(v.shape[1])  # kaiming_uniform_ with a = sqrt(5): sqrt(6 / (1 + 5) / fan_in)
    return torch.empty(v.shape).uniform_(-bound, bound, generator=generator).to(v.device)


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrix, uniform (Haar) over all of them, shape ``(size, size)``, fp32."""
    return uniform_orthonormal(torch.randn(size, size, generator=generator, dtype=torch.float64)).float()


def uniform_orthonormal(normal: Tensor) -> Tensor:
    """Orthonormal columns, uniform (Haar) over all matrices of this shape that have them, in the type of `normal`.

    QR of a Gaussian matrix is uniform once the signs of R's diagonal are moved into Q (Mezzadri, 2007).

    Args:
        normal: Independent normal entries of mean 0 and one variance, shape ``(n, k)`` with k <= n.
    """
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal().sign()


def _whitening_scale(ratio: Tensor) -> Tensor:
    ratio = ratio.detach().float()
    return torch.where(ratio > 0, ratio, 1.0).sqrt()
