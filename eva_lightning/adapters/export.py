"""Adapters out of a module: a folder stock PEFT reads, or weights merged into the base model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.adapters.layers import AdapterLayer, describe_layers, find_adapters, replace_everywhere


def save_pretrained(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapters, head and biases that train in ``model`` as a PEFT adapter folder.

    ``PeftModel.from_pretrained(base, directory)`` on a freshly built ``model`` without adapters then computes what
    ``model`` computes. Pass the network itself (``module.net``), not the LightningModule around it, to get names that
    fit the bare network. Layers that trained in full, and batch norms with their statistics, go in as
    ``modules_to_save``.

    Args:
        model: a module that contains LoRA layers, with or without a PeftModel around it.
        directory: created if missing; ``adapter_config.json`` and ``adapter_model.safetensors`` are overwritten.

    Returns:
        The directory.

    Raises:
        ValueError: there are no LoRA layers, or they come from several LoraConfigs.
    """
    from peft import PeftModel
    from safetensors.torch import save_file

    if isinstance(model, PeftModel):
        model = model.get_base_model()
    layers = find_adapters(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers to save")
    if len({id(layer.config) for layer in layers.values()}) > 1:
        raise ValueError("the LoRA layers come from several LoraConfigs; save each PeftModel on its own")
    config = copy.deepcopy(next(iter(layers.values())).config)
    describe_layers(config, [(_plain(layer.path), layer) for layer in layers.values()])
    # the file holds A and B: PEFT must not initialise anew on loading
    config.init_lora_weights = True
    config.inference_mode = True
    whole, loose = _trained_outside(model, layers)
    config.modules_to_save = sorted({_plain(name) for name in whole}) or None

    tensors: dict[str, Tensor] = {}
    for layer in layers.values():
        prefix = f"base_model.model.{_plain(layer.path)}"
        for name, tensor in layer.module.state_dict().items():
            if name.startswith("lora_"):
                tensors[f"{prefix}.{name.replace(f'.{layer.adapter}', '', 1)}"] = tensor
    for name in whole:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{_plain(name)}.{key}"] = tensor
    if config.bias != "none":
        tensors |= {f"base_model.model.{_plain(n)}": t for n, t in loose.items() if n.rpartition(".")[2] == "bias"}
        loose = {n: t for n, t in loose.items() if n.rpartition(".")[2] != "bias"}
    if loose:
        warnings.warn(
            f"parameters {sorted(loose)} train, but a PEFT adapter folder cannot hold single parameters: they are not "
            "in it; keep a Lightning checkpoint for them",
            stacklevel=2,
        )
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, path / "adapter_model.safetensors"
    )
    config.save_pretrained(str(path))
    return path


def merge_and_unload(module: nn.Module) -> nn.Module:
    """Add every adapter to its base weight, in fp32 with one rounding at the end, and remove it; returns ``module``.

    DoRA and quantised base layers go through PEFT's own ``merge``.

    Raises:
        ValueError: merging gives NaN or infinite weights; names the layer (layers before it are merged already).
    """
    for layer in find_adapters(module).values():
        base: Any = layer.base
        simple = layer.adapter not in layer.module.lora_variant and type(base) is nn.Linear
        with torch.no_grad():
            if simple and layer.module.lora_B[layer.adapter].bias is None:
                delta = layer.module.scaling[layer.adapter] * layer.b.float() @ layer.a.float()
                merged = (base.weight.float() + delta).to(base.weight.dtype)
                if not torch.isfinite(merged).all():
                    raise ValueError(f"layer {layer.name!r}: merged weights are NaN or infinite")
                base.weight.copy_(merged)
            else:
                layer.module.merge(safe_merge=True, adapter_names=[layer.adapter])
        replace_everywhere(module, layer.module, base)
    if "peft_config" in vars(module):
        delattr(module, "peft_config")
    return module


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _trained_outside(model: nn.Module, layers: dict[str, AdapterLayer]) -> tuple[list[str], dict[str, Tensor]]:
    """Modules to save whole, and single trained parameters besides, by name in ``model``."""
    adapters = {id(p) for layer in layers.values() for n, p in layer.module.named_parameters() if "base_layer" not in n}
    whole: list[str] = []
    loose: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        own = {k: p for k, p in m.named_parameters(recurse=False) if id(p) not in adapters}
        trained = {k: p for k, p in own.items() if p.requires_grad}
        norm = isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None
        if name and not name.endswith("base_layer") and (norm or (trained and len(trained) == len(own) and _leaf(m))):
            whole.append(name)
        else:
            loose |= {f"{name}.{k}" if name else k: p for k, p in trained.items()}
    return whole, loose


def _leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
