"""Adapters of a split model for users of stock timm: q, k and v as one LoRA on the fused projection, exactly."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva_lightning.adapters import save_pretrained
from eva_lightning.adapters.adalora import is_adalora
from eva_lightning.adapters.export import CONFIG
from eva_lightning.errors import InputError
from eva_lightning.files import filling, replacing, write_json
from eva_lightning.vision.backbone.split_fused import split_layers

_ROOT = "base_model.model."


def save_fused_adapter(model: nn.Module, directory: str | Path) -> Path:
    """As :func:`eva_lightning.adapters.save_pretrained`, in the layout of the model before it was split.

    ``PeftModel.from_pretrained(timm_model, directory)`` then computes what `model` computes. On a fused layer the
    parts' A stand above each other and their B on the diagonal, so its rank is the sum of theirs: the same products,
    in more memory (the zeros of B). DoRA's magnitudes belong to outputs, and stand one after the other likewise.

    Args:
        model: A model with adapters, split by :func:`~eva_lightning.vision.backbone.split_fused.split_fused`. Not
            changed.
        directory: As for ``save_pretrained``.

    Returns:
        The directory.

    Raises:
        InputError: AdaLoRA (its scale depends on the ranks of single layers), or what ``save_pretrained`` refuses.
    """
    if is_adalora(model):
        raise InputError("AdaLoRA's adapters cannot be fused exactly: keep those of the split layout")
    with filling(directory, last=CONFIG) as temporary:
        _fuse(model, save_pretrained(model, temporary))
    return Path(directory)


def _fuse(model: nn.Module, folder: Path) -> None:
    """Rewrite an adapter folder of the split layout."""
    file = folder / "adapter_model.safetensors"
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(file)
    for path, layer in split_layers(model).items():
        parts = {name: _Part.take(tensors, f"{path}.{name}", part, config) for name, part in layer.named_children()}
        _drop_patterns(config, [f"{path}.{name}" for name in parts])
        _put(tensors, path, list(parts.values()), config)
    suffix = ".lora_A.weight"
    names = {key.removeprefix(_ROOT).removesuffix(suffix) for key in tensors if key.endswith(suffix)}
    config["target_modules"] = "|".join(re.escape(name) for name in sorted(names))
    with replacing(file) as new:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, new)
    write_json(folder / CONFIG, config)


@dataclass(frozen=True)
class _Part:
    """One part of a fused layer: what the file holds of it, and what it has in the model."""

    a: Tensor | None
    b: Tensor | None
    magnitude: Tensor
    b_bias: Tensor | None
    bias: Tensor | None
    saved_bias: bool
    scaling: float
    out_features: int

    def block(self, scaling: float) -> Tensor:
        """B to be scaled by `scaling`, shape ``(out_features, rank)``; rank 0 for a part without adapter."""
        if self.b is None:
            return torch.zeros(self.out_features, 0)
        return self.b if self.scaling == scaling else self.b * (self.scaling / scaling)

    @classmethod
    def take(cls, tensors: dict[str, Tensor], path: str, module: nn.Module, config: dict[str, Any]) -> _Part:
        """Move what the file holds of the layer at `path` out of `tensors`."""
        mine = {key: tensors.pop(key) for key in list(tensors) if key.startswith(f"{_ROOT}{path}.")}
        found = {key.removeprefix(f"{_ROOT}{path}."): tensor for key, tensor in mine.items()}
        base: Any = module.get_base_layer() if hasattr(module, "lora_A") else module  # type: ignore[operator]
        a = found.get("lora_A.weight")
        magnitude = next((t for key, t in found.items() if key.startswith("lora_magnitude_vector")), None)
        if magnitude is None:
            magnitude = torch.linalg.vector_norm(base.weight.detach().cpu(), dim=1)
        return cls(
            a,
            found.get("lora_B.weight"),
            magnitude,
            found.get("lora_B.bias"),
            None if base.bias is None else base.bias.detach().cpu(),
            any(key in found for key in ("bias", "base_layer.bias")),
            0.0 if a is None else _scaling(config, path, len(a)),
            base.out_features,
        )


def _scaling(config: dict[str, Any], path: str, rank: int) -> float:
    alpha = config["alpha_pattern"].get(_anchored(path), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def _put(tensors: dict[str, Tensor], path: str, parts: list[_Part], config: dict[str, Any]) -> None:
    """Put the parts into `tensors` as one layer at `path`, and its rank and alpha into `config`."""
    adapted = [part for part in parts if part.a is not None and part.b is not None]
    prefix = f"{_ROOT}{path}"
    if any(part.saved_bias for part in parts):
        wrapped = ".base_layer" if adapted else ""
        tensors[f"{prefix}{wrapped}.bias"] = torch.cat([part.bias for part in parts if part.bias is not None])
    if not adapted:
        return
    scaling = max(part.scaling for part in adapted)
    blocks = [part.block(scaling) for part in parts]
    a = torch.cat([part.a for part in adapted if part.a is not None])
    tensors[f"{prefix}.lora_A.weight"] = a
    tensors[f"{prefix}.lora_B.weight"] = torch.block_diag(*blocks).to(a.dtype)
    rank = len(a)
    config["rank_pattern"][_anchored(path)] = rank
    config["alpha_pattern"][_anchored(path)] = scaling * (math.sqrt(rank) if config["use_rslora"] else rank)
    if config["use_dora"]:
        tensors[f"{prefix}.lora_magnitude_vector"] = torch.cat([part.magnitude for part in parts])
    biases_of_b = [part.b_bias for part in parts]
    if any(bias is not None for bias in biases_of_b):
        biases = [torch.zeros(len(block)) if b is None else b for block, b in zip(blocks, biases_of_b, strict=True)]
        tensors[f"{prefix}.lora_B.bias"] = torch.cat(biases)


def _drop_patterns(config: dict[str, Any], paths: list[str]) -> None:
    for path in paths:
        for pattern in (config["rank_pattern"], config["alpha_pattern"]):
            pattern.pop(_anchored(path), None)


def _anchored(path: str) -> str:
    return "^" + re.escape(path)
