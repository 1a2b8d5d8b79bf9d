"""One LoRA layer: its rank and scaling, what its A is applied to, and how to change it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.errors import InputError
from eva_lightning.layer_inputs import Convolution, LayerInputs, PatchInputs


@dataclass(frozen=True)
class AdapterLayer:
    """One LoRA layer: ``W x + scaling * B A x`` with A (rank, in_features) and B (out_features, rank).

    On a convolution A is a convolution too, with the base layer's kernel, and B is a 1 x 1 convolution: then x is a
    patch and ``in_features`` its length.

    Attributes:
        name: canonical name, that of the wrapped layer in the module without PEFT's and torch.compile's wrappers
            (``net.blocks.0.attn.qkv`` for ``net.base_model.model.blocks.0.attn.qkv``), so that a state measured on
            one form of a model fits the other.
        path: the name of the LoRA layer in ``module.named_modules()``.
        module: the PEFT layer.
        adapter: the adapter's name in that layer.
        config: the LoraConfig the layer was made from; shared by the layers of one injection.
    """

    name: str
    path: str
    module: Any
    adapter: str
    config: Any

    has_fixed_rank = False
    """Whether PEFT can store no other rank for this layer than the one it was made with."""

    @property
    def rank(self) -> int:
        return int(self.module.r[self.adapter])

    @property
    def alpha(self) -> float:
        return float(self.module.lora_alpha[self.adapter])

    @property
    def in_features(self) -> int:
        return math.prod(self.a.shape[1:])

    @property
    def a(self) -> nn.Parameter:
        return self.module.lora_A[self.adapter].weight

    @property
    def b(self) -> nn.Parameter:
        return self.module.lora_B[self.adapter].weight

    @property
    def base(self) -> nn.Module:
        return self.module.get_base_layer()

    @property
    def is_fresh(self) -> bool:
        """Whether B is still zero: the adapter has changed nothing yet, so A may be replaced freely."""
        return self.b.device.type == "meta" or not bool(torch.count_nonzero(self.b.detach()))

    def inputs(self) -> LayerInputs:
        """How to read what A is applied to."""
        filters = self.module.lora_A[self.adapter]
        if isinstance(filters, Convolution):
            return PatchInputs(self.base, filters)
        return LayerInputs(self.base, self.in_features)

    def alpha_for(self, rank: int) -> float:
        """The alpha that keeps the scaling when the rank changes: alpha/r for LoRA, alpha/sqrt(r) for rsLoRA.

        Equals alpha * r_new / r (paper section 4.1), or alpha * sqrt(r_new / r) for rsLoRA.
        """
        ratio = rank / self.rank
        return self.alpha * (math.sqrt(ratio) if self.module.use_rslora[self.adapter] else ratio)

    def resize(self, rank: int, alpha: float | None = None) -> None:
        """Give the layer a new rank with B = 0 and an A to be written; all else stays: dtype, flags, DoRA's magnitude.

        Args:
            rank: the new rank, at least 1.
            alpha: the new alpha; by default the one that keeps the scaling.
        """
        alpha = self.alpha_for(rank) if alpha is None else alpha
        layer, adapter = self.module, self.adapter
        parts = {n: p for n, p in layer.named_parameters() if f".{adapter}" in n and not n.startswith("base_layer")}
        kept = {n: (p.dtype, p.requires_grad, p.data) for n, p in parts.items()}
        modes = {n: m.training for n, m in layer.named_modules()}
        config = copy.copy(self.config)
        # "eva" is PEFT's word for "B = 0 and leave A alone", which its convolutions do not know; other values than
        # these two would run their own initialisation here
        config.init_lora_weights = True if isinstance(layer.lora_A[adapter], Convolution) else "eva"
        self._update_layer(rank, alpha, config)
        for n, p in layer.named_parameters():
            if n in kept:
                dtype, flag, data = kept[n]
                p.data = data if n.startswith("lora_magnitude_vector") else p.data.to(dtype)
                p.requires_grad_(flag)
        for n, m in layer.named_modules():
            m.training = modes.get(n, layer.training)

    def _update_layer(self, rank: int, alpha: float, config: Any) -> None:
        self.module.update_layer(self.adapter, rank, alpha, config=config)

    def reset_magnitude(self) -> None:
        """Set DoRA's magnitude to the norm its forward pass computes, in that precision; nothing for other adapters.

        A magnitude computed in fp32 and rounded to bf16 later is not the norm of the rounded weight: the adapter
        would change the function before any training.
        """
        if self.adapter in self.module.lora_magnitude_vector:
            from peft.utils.integrations import dequantize_module_weight

            dora = self.module.lora_magnitude_vector[self.adapter]
            weight: Any = dequantize_module_weight(self.base).data
            if self.is_quantised:
                weight = weight.to(self.a.dtype)
            dora.weight.data = dora.get_weight_norm(weight, torch.zeros_like(weight[:1, :1]), 1.0).to(dora.weight.dtype)

    @property
    def is_quantised(self) -> bool:
        weight: Any = self.base.weight
        return not weight.is_floating_point()

    def write(self, a: Tensor) -> None:
        """Set A to ``a`` (rank, in_features), rounded to the parameter's dtype, and B (and its bias) to zero."""
        if tuple(a.shape) != (self.a.shape[0], self.in_features):
            raise InputError(
                f"layer {self.name!r}: A has shape {(self.a.shape[0], self.in_features)}, got {tuple(a.shape)}"
            )
        with torch.no_grad():
            if self.a.device.type != "meta":
                self.a.copy_(a.view(self.a.shape))
            self.b.zero_()
            bias = self.module.lora_B[self.adapter].bias
            if bias is not None:
                bias.zero_()


@dataclass(frozen=True)
class SkippedLayer(AdapterLayer):
    """A LoRA layer that EVA leaves as it is.

    Attributes:
        reason: why, as a clause to follow the layer's name.
    """

    reason: str = ""
