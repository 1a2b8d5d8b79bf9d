"""The position embedding of DINOv2 for another image size, as the official code resamples it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eva_lightning.errors import InputError

PositionEmbedding = Literal["official", "timm"]

#: ``"official"``: DINOv2 without registers as its own code does it, every other model as timm does.
CHOICES: tuple[PositionEmbedding, ...] = ("official", "timm")

#: Patches added to the grid before the scale factor is taken (``interpolate_offset`` of the official code).
OFFSET = 0.1


def differs_from_timm(model_name: str) -> bool:
    """Whether the official code resamples another way than timm: DINOv2 without registers.

    The official models with registers set ``interpolate_offset=0.0`` and ``interpolate_antialias=True``
    (dinov2/hub/backbones.py), which is what timm does for all.
    """
    architecture = model_name.partition(".")[0]
    return "dinov2" in architecture and "reg" not in architecture


def resample(embedding: Tensor, grid: tuple[int, int], prefix_tokens: int = 1) -> Tensor:
    """A square position embedding on another grid (``interpolate_pos_encoding`` of DINOv2's vision_transformer.py).

    Bicubic without antialiasing, by a scale FACTOR of ``(size + 0.1) / old size`` instead of the exact size: torch
    computes sample positions from the factor, so that rows drift by 0.6% of the grid at 16 of 37 patches. The published
    models were evaluated with it.

    Args:
        embedding: Shape ``(1, prefix_tokens + n * n, dim)``.
        grid: Rows and columns of patches wanted.
        prefix_tokens: Leading entries that belong to no patch ([CLS]); kept.

    Returns:
        Shape ``(1, prefix_tokens + grid[0] * grid[1], dim)``, in the dtype given; the embedding itself on its own grid.

    Raises:
        InputError: The patches form no square.
    """
    prefix, patches = embedding[:, :prefix_tokens], embedding[:, prefix_tokens:]
    size = math.isqrt(patches.shape[1])
    if size * size != patches.shape[1]:
        raise InputError(f"a position embedding of {patches.shape[1]} patches is not square")
    if grid == (size, size):
        return embedding
    image = patches.float().reshape(1, size, size, -1).permute(0, 3, 1, 2)
    factors = tuple((length + OFFSET) / size for length in grid)
    image = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=False)
    resampled = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    return torch.cat([prefix, resampled.to(embedding.dtype)], dim=1)


def resample_state(state: Mapping[str, Tensor], image_size: int) -> dict[str, Tensor]:
    """The weights of a DINOv2 without registers for images of `image_size` pixels; others are returned as they are."""
    embedding, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    resampled = dict(state)
    # what does not look like such weights is left to strict loading, which says what is wrong with it
    if embedding is not None and patches is not None and embedding.ndim == 3 and patches.ndim == 4:
        size = image_size // patches.shape[-1]
        square = math.isqrt(embedding.shape[1] - 1) ** 2 == embedding.shape[1] - 1
        if size and square and embedding.shape[1] > 1:
            resampled["pos_embed"] = resample(embedding, (size, size))
    return resampled
