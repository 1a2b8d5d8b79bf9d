"""Fused projections of timm transformers taken apart, so that q, k, v and the halves of SwiGLU get an adapter each.

timm computes q, k and v by one linear layer, and the gate and the value of a packed SwiGLU by another. The authors of
EVA split both (in DINOv2-g/14: 7 targets per block, 280 in all), so that each part has its own rank and its own B. The
parts read the same tensor, so EVA decomposes it once for all of them (:mod:`eva_lightning.capture`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from timm.layers import GluMlp, SwiGLU  # type: ignore[attr-defined]
from torch import Tensor, nn

from eva_lightning.errors import InputError, InputTypeError


class SplitLinear(nn.Module):
    """Linear layers side by side: ``concat([part(x) for part in parts])``, each part a child with a name of its own.

    Args:
        parts: Name -> layer, in the order of their outputs; all of the same width and output size.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., sum of out_features)``."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


def split_fused(model: nn.Module) -> list[str]:
    """Take the fused projections of `model` apart, in place; the function it computes stays.

    ``qkv`` becomes ``qkv.q``, ``qkv.k`` and ``qkv.v``; ``kv`` (attention pooling) ``kv.k`` and ``kv.v``; ``fc1`` of
    packed SwiGLU (timm's GluMlp) ``fc1.gate`` and ``fc1.up``. Weights are copied part by part and the fused ones let
    go, so at most one fused layer is held twice.

    Returns:
        Names of the layers that were split.

    Raises:
        InputError: There is no fused projection in the model.
    """
    fused = list(_fused_layers(model))
    for parent, name, path, parts in fused:
        layer = parent.get_submodule(name)
        assert isinstance(layer, nn.Linear), path
        setattr(parent, name, SplitLinear(dict(zip(parts, _pieces(layer, len(parts)), strict=True))))
    if not fused:
        raise InputError(
            f"{type(model).__name__} has no fused projection to split (a linear layer qkv, kv, or fc1 of a packed "
            "SwiGLU): leave split_fused out"
        )
    return [path for _, _, path, _ in fused]


def swiglu_layers(module: nn.Module) -> list[str]:
    """Names of the MLPs with a SwiGLU in `module`, split or not."""
    return [path for path, layer in module.named_modules() if isinstance(layer, GluMlp | SwiGLU)]


def split_layers(model: nn.Module) -> dict[str, SplitLinear]:
    """The layers that :func:`split_fused` made, by name."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SplitLinear)}


def fuse(model: nn.Module) -> list[str]:
    """Undo :func:`split_fused` in place: `model` has timm's layout again, and stock timm loads its ``state_dict()``.

    Returns:
        Names of the layers that were fused.

    Raises:
        InputError: A part has an adapter; says what to do with it first.
    """
    split = split_layers(model)
    for path, layer in split.items():
        if any(hasattr(part, "lora_A") for part in layer.children()):
            raise InputError(
                f"{path} has adapters on its parts: add them to the weights first (eva_lightning.adapters."
                "merge_and_unload), or export them for the fused layout (fused_adapter.save_fused_adapter)"
            )
    for path, layer in split.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _joined(list(layer.children())))
    return list(split)


def _joined(parts: list[nn.Module]) -> nn.Linear:
    weights = [_linear(part).weight for part in parts]
    biases = [_linear(part).bias for part in parts]
    out, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    fused = nn.Linear(width, out, bias=biases[0] is not None, device="meta", dtype=weights[0].dtype)
    fused.weight = _parameter(torch.cat([weight.detach() for weight in weights]), weights[0].requires_grad)
    if biases[0] is not None:
        fused.bias = _parameter(torch.cat([bias.detach() for bias in biases]), biases[0].requires_grad)
    return fused.train(parts[0].training)


def _fused_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, tuple[str, ...]]]:
    """Parent, name in it, path, and names of the parts in the order of their outputs."""
    for prefix, parent in model.named_modules():
        names: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}
        if isinstance(parent, GluMlp):
            names["fc1"] = ("up", "gate") if parent.gate_last else ("gate", "up")
        for name, parts in names.items():
            layer = parent._modules.get(name)
            if type(layer) is nn.Linear and layer.out_features % len(parts) == 0:
                yield parent, name, f"{prefix}.{name}" if prefix else name, parts


def _pieces(layer: nn.Linear, count: int) -> list[nn.Linear]:
    pieces = []
    for index in range(count):
        rows = slice(index * layer.out_features // count, (index + 1) * layer.out_features // count)
        piece = nn.Linear(layer.in_features, layer.out_features // count, bias=layer.bias is not None, device="meta")
        piece.weight = _parameter(layer.weight.detach()[rows].clone(), layer.weight.requires_grad)
        if layer.bias is not None:
            piece.bias = _parameter(layer.bias.detach()[rows].clone(), layer.bias.requires_grad)
        pieces.append(piece.train(layer.training))
    return pieces


def _parameter(data: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=requires_grad)


def _linear(part: nn.Module) -> nn.Linear:
    if not isinstance(part, nn.Linear):
        raise InputTypeError(f"a part of a SplitLinear must be a linear layer to be fused, got {type(part).__name__}")
    return part
