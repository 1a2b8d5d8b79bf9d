"""Kinds of layers: which can be adapted, and why others cannot."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from eva_lightning.adapters.adapter_layer import AdapterLayer, SkippedLayer
from eva_lightning.adapters.attention import OUT_PROJECTION, AttentionInputLayer, AttentionOutputLayer
from eva_lightning.layer_inputs import Convolution

OUT_PROJECTION_IS_SILENT = (
    "nn.MultiheadAttention reads the weight of its out_proj without calling it; name the attention itself"
)


def is_linear(layer: nn.Module) -> bool:
    """nn.Linear, quantised ones included, or transformers' Conv1D (GPT-2), a linear layer with a transposed weight."""
    # not imported for this: a module that is not loaded has no instances
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return isinstance(layer, nn.Linear) or (conv1d is not None and isinstance(layer, conv1d))


def is_adaptable(layer: nn.Module) -> bool:
    """Whether LoRA with an EVA initialisation is possible on a layer of this type."""
    return is_linear(layer) or isinstance(layer, (*Convolution, nn.MultiheadAttention))


SUPPORTED = (
    "supported are nn.Linear (also quantised), transformers' Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d and "
    "nn.MultiheadAttention"
)


def refusal(layer: nn.Module) -> str | None:
    """Why a layer cannot be adapted, or ``None``."""
    if isinstance(layer, nn.Embedding):
        return "an nn.Embedding's inputs are indices, there is no activation to decompose"
    if isinstance(layer, Convolution):
        if layer.groups > 1:
            return f"a convolution with groups={layer.groups}: PEFT's A mixes the groups and can never be merged"
        if any(d > 1 and k > 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
            return f"a convolution with dilation={layer.dilation}: PEFT makes its A without dilation"
        if layer.padding_mode != "zeros":
            return f"a convolution with padding_mode={layer.padding_mode!r}: PEFT's A pads with zeros"
    if isinstance(layer, nn.MultiheadAttention) and not layer._qkv_same_embed_dim:
        return "an nn.MultiheadAttention with kdim or vdim of its own: PEFT adapts only the packed projection"
    return None


def is_silent(layer: AdapterLayer) -> bool:
    """Whether the adapter is of an attention's ``out_proj`` alone, which is never called: it changes nothing."""
    return isinstance(layer, SkippedLayer) and layer.reason == OUT_PROJECTION_IS_SILENT


def unsupported(layer: nn.Module) -> str | None:
    """Why a layer with parameters is of no kind that can be adapted, or ``None``."""
    if is_adaptable(layer) or isinstance(layer, nn.Embedding) or next(layer.parameters(recurse=False), None) is None:
        return None
    return f"layers of the kind {type(layer).__name__} are not supported; {SUPPORTED}"


def unsupported_kinds(module: nn.Module) -> str:
    """Which layers with weight matrices cannot be adapted, one of each kind, in a sentence; empty if there are none."""
    kinds: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for name, m in module.named_modules():
        own = ((n, p) for n, p in m.named_parameters(recurse=False) if not isinstance(p, UninitializedParameter))
        if not name or not any("weight" in n and p.dim() > 1 for n, p in own):
            continue
        kind, reason = type(m).__name__, refusal(m)
        if unsupported(m):
            kinds.setdefault(kind, f"{kind} ({name!r})")
        elif reason is not None and not isinstance(m, nn.Embedding):
            reasons.setdefault(kind, f"{name!r} cannot be adapted: {reason}")
    sentences = list(reasons.values())
    if kinds:
        sentences.append(f"layers of these kinds are not supported: {', '.join(kinds.values())}; {SUPPORTED}")
    return "; ".join(sentences)


def make_layer(
    name: str, path: str, module: Any, adapter: str, config: Any, attention: nn.MultiheadAttention | None
) -> AdapterLayer:
    """The :class:`AdapterLayer` for a PEFT layer; a :class:`SkippedLayer` where EVA does not apply.

    Args:
        attention: the attention whose ``out_proj`` this is, if it is one.
    """
    from peft.tuners.lora.layer import MultiheadAttention

    common = (name, path, module, adapter, config)
    reason = refusal(module.get_base_layer())
    if type(module).__name__ == "ParamWrapper":
        reason = "LoRA on a parameter (target_parameters): no layer is called on its input"
    elif adapter in module.lora_A and not isinstance(module.lora_A[adapter], (nn.Linear, *Convolution)):
        reason = f"{type(module).__name__}: its A is not that of plain LoRA"
    if reason is not None:
        return SkippedLayer(*common, reason=reason)
    if isinstance(module, MultiheadAttention):
        return AttentionInputLayer(*common)
    if attention is not None:
        if not path.endswith(OUT_PROJECTION):
            return SkippedLayer(*common, reason=OUT_PROJECTION_IS_SILENT)
        return AttentionOutputLayer(name.replace(OUT_PROJECTION, ".out_proj"), *common[1:], attention=attention)
    return AdapterLayer(*common)
