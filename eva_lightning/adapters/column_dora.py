"""DoRA as the authors' vision code has it: a frozen magnitude, and norms per input column instead of per output.

``W' = (W + s B A) diag(m / ||W + s B A||)`` with the norm of every column (over the outputs) and m that of W, so the
function at the start is W's. PEFT's DoRA, and the DoRA paper's, takes norms per output, trains m, and treats the norm
of the sum as a constant in the backward pass; here the gradient goes through it (``adapters/dora_linear.py`` there).

As m follows from the frozen base weight, the layer has LoRA's parameters and nothing else: ranks are redistributed,
checkpoints resumed and adapters merged as with LoRA. Stock PEFT cannot run it, so it is not exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.supported_layers import is_linear
from eva_lightning.errors import InputError


class ColumnDora:
    """What PEFT asks of a variant of LoRA (``peft.tuners.lora.layer.LoraVariant``); without state."""

    @staticmethod
    def supports_lora_conversion() -> bool:
        """It is no LoRA of any rank."""
        return False

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to make: the magnitude follows from the base weight."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """``W' x + b`` for inputs ``(..., in_features)``; `result`, what the base layer gave, is not needed."""
        base = module.get_base_layer()
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        weight = scaled_to_columns(base.weight, module.scaling[active_adapter] * (b @ a))
        return F.linear(x.to(weight.dtype), weight, base.bias).to(result.dtype)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight that computes the same without an adapter."""
        return scaled_to_columns(orig_weight, module.get_delta_weight(active_adapter)).to(orig_weight.dtype)


def scaled_to_columns(weight: Tensor, delta: Tensor) -> Tensor:
    """``weight + delta`` (out, in) with the column norms of `weight`; a column without length stays 0."""
    changed = weight + delta
    length = torch.linalg.vector_norm(changed, dim=0, keepdim=True).clamp_min(torch.finfo(changed.dtype).tiny)
    return changed * (torch.linalg.vector_norm(weight, dim=0, keepdim=True) / length)


def norm_by_column(layer: AdapterLayer) -> None:
    """Make a LoRA layer compute :class:`ColumnDora`'s function; its parameters stay.

    Raises:
        InputError: It is not linear, or has dropout, a bias of B or a transposed or quantised weight.
    """
    m, adapter = layer.module, layer.adapter
    usual = is_linear(layer.base) and not getattr(m, "fan_in_fan_out", False) and m.lora_B[adapter].bias is None
    if not usual or layer.is_quantised or not isinstance(m.lora_dropout[adapter], nn.Identity):
        raise InputError(
            f"dora_by_column is for linear layers without dropout, LoRA biases or quantisation, but {layer.name!r} is "
            "none: leave it out, or use dora as PEFT has it"
        )
    m.lora_variant[adapter] = ColumnDora()


def is_normed_by_column(layer: AdapterLayer) -> bool:
    """Whether :func:`norm_by_column` was called on the layer."""
    return isinstance(getattr(layer.module, "lora_variant", {}).get(layer.adapter), ColumnDora)
