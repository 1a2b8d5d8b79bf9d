"""What a single layer computes, on an input made for it: how a change that should keep the function is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.adapters.layer_copy import independent_copy
from eva_lightning.layer_inputs import Convolution, LayerInputs
from eva_lightning.side_effects import isolated_rng

ROWS = 8
"""Inputs (tokens, images) in a probe."""

TOLERANCE = 1e-5
"""Largest difference of two outputs that count as equal, over the largest output: layers are compared in fp64."""

QUANTISED_TOLERANCE = {8: 0.05, 4: 0.3}
"""The same by the bits of a quantised weight, which is rounded again after a change."""


def working_copy(layer: nn.Module) -> Any:
    """A copy in eval mode and fp64 (quantised layers: in their own precision) that can be changed at will."""
    twin = independent_copy(layer).eval()
    if is_quantised(twin):
        return twin
    # not on Apple's GPUs
    return twin.to(torch.float32 if _device(twin).type == "mps" else torch.float64)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer has a weight of whole numbers."""
    return any(not p.is_floating_point() and not p.is_complex() for p in layer.parameters())


def tolerance(layer: nn.Module) -> float:
    """The bound for :func:`difference` within which a layer counts as unchanged."""
    if not is_quantised(layer):
        return TOLERANCE
    return QUANTISED_TOLERANCE[4 if any(type(p).__name__ == "Params4bit" for p in layer.parameters()) else 8]


def probe_inputs(layer: nn.Module, base: nn.Module) -> tuple[Tensor, ...]:
    """Arguments to call ``layer`` with: the same numbers every time, of the shape that ``base`` takes.

    Shapes: ``(ROWS, in_features)``; indices ``(ROWS * 8,)`` at most for an embedding; ``(ROWS, 2, embed_dim)`` three
    times for an attention; ``(2, in_channels, ...)`` just above the kernel's size for a convolution.
    """
    device = _device(layer)
    if isinstance(base, nn.Embedding):
        count = min(base.num_embeddings, 8 * ROWS)
        return (torch.linspace(0, base.num_embeddings - 1, count).long().to(device),)
    if isinstance(base, nn.MultiheadAttention):
        shape: tuple[int, ...] = (ROWS, 2, base.embed_dim)
    elif isinstance(base, Convolution):
        reach = [d * (k - 1) + 2 * s + 1 for d, k, s in zip(base.dilation, base.kernel_size, base.stride, strict=True)]
        shape = (2, base.in_channels, *reach)
    else:
        shape = (ROWS, LayerInputs(base).width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    floating = [p.dtype for p in layer.parameters() if p.is_floating_point()]
    x = x.to(device, floating[0] if floating else torch.float32)
    return (x, x, x) if isinstance(base, nn.MultiheadAttention) else (x,)


def output(call: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Tensor:
    """What ``call`` returns for ``inputs`` (the first of several), without effect on the global generators."""
    with torch.no_grad(), isolated_rng(), torch.autocast(inputs[0].device.type, enabled=False):
        torch.manual_seed(0)
        out = call(*inputs)
    return out[0] if isinstance(out, tuple) else out


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value; infinite where shapes differ or a value is NaN."""
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    gap = float((a - b).abs().max())
    scale = float(a.abs().max()) or 1.0
    return math.inf if math.isnan(gap / scale) else gap / scale


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device
