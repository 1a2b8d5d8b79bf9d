"""Adapters out of a module: a folder stock PEFT reads, or weights merged into the base model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_lightning.adapters.adalora import is_adalora
from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.base_weight_init import INITIAL_A, INITIAL_B
from eva_lightning.adapters.registry import describe_layers, find_adapters, lora_layers, replace_everywhere
from eva_lightning.errors import InputError
from eva_lightning.files import filling


def save_pretrained(model: nn.Module, directory: str | Path) -> Path:
    """Write the adapters, head and biases that train in ``model`` as a PEFT adapter folder.

    ``PeftModel.from_pretrained(base, directory)`` on a freshly built ``model`` without adapters then computes what
    ``model`` computes. Pass the network itself (``module.net``), not the LightningModule around it, to get names that
    fit the bare network. PiSSA, MiLoRA, OLoRA, CorDA and LoRA-GA, which have taken a part of the base weight away, go
    in as plain LoRA of twice the rank: the change since their start. Layers that trained in full, and batch norms with
    their statistics, go in as ``modules_to_save``.

    Args:
        model: a module that contains LoRA layers, with or without a PeftModel around it.
        directory: created if missing; ``adapter_config.json`` and ``adapter_model.safetensors`` are overwritten.

    Returns:
        The directory.

    Raises:
        InputError: there are no LoRA layers, they come from several LoraConfigs, or PEFT cannot tell by its name a
            module that trained in full from another.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model = model.get_base_model()
    layers = lora_layers(model)
    if not find_adapters(model) and not is_adalora(model):
        raise InputError(f"{type(model).__name__} has no LoRA layers to save")
    if len({id(layer.config) for layer in layers}) > 1:
        raise InputError("the LoRA layers come from several LoraConfigs; save each PeftModel on its own")
    config = copy.deepcopy(layers[0].config)
    names = [_plain(name) for name, _ in model.named_modules()]
    describe_layers(config, [(_plain(layer.path), layer) for layer in layers], names)
    moved = any(hasattr(layer.module, INITIAL_A) for layer in layers)
    if is_adalora(model):
        config.rank_pattern = None  # AdaLoRA's are masks; the ranks it gave up are zeros in E
    elif moved:
        _double(config)
    # the file holds A and B: PEFT must not initialise them again on loading
    config.init_lora_weights = True
    config.inference_mode = True
    whole, loose = _trained_outside(model, layers)
    _check_reach([_plain(name) for name in whole], [_plain(n) for n, m in model.named_modules() if m.state_dict()])
    config.modules_to_save = sorted({_plain(name) for name in whole}) or None

    tensors: dict[str, Tensor] = {}
    for layer in layers:
        prefix = f"base_model.model.{_plain(layer.path)}"
        weights = layer.module.state_dict()
        for name, tensor in (_as_plain_lora(weights, layer) if moved else weights).items():
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
    with filling(directory) as temporary:
        plain = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
        save_file(plain, temporary / "adapter_model.safetensors")
        config.save_pretrained(str(temporary))
    return Path(directory)


def _double(config: Any) -> None:
    """Twice every rank, with the same scaling."""
    factor = 2**0.5 if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}


def _as_plain_lora(weights: Mapping[str, Tensor], layer: AdapterLayer) -> dict[str, Tensor]:
    """``B A - B0 A0`` as one product ``[B, -B0] [A; A0]``."""
    a, b = f"lora_A.{layer.adapter}.weight", f"lora_B.{layer.adapter}.weight"
    return {
        **weights,
        a: torch.cat([weights[a], weights[INITIAL_A]]),
        b: torch.cat([weights[b], -weights[INITIAL_B]], dim=1),
    }


def merge_and_unload(module: nn.Module) -> nn.Module:
    """Add every adapter to its base weight and remove it; returns ``module``.

    Plain LoRA is added in fp32 with one rounding at the end; DoRA and quantised base layers go through PEFT's own
    ``merge``.

    Raises:
        InputError: merging gives NaN or infinite weights; names the layer (layers before it are merged already).
    """
    for layer in lora_layers(module):
        base = layer.base
        layer.merge()
        replace_everywhere(module, layer.module, base)
    return module


def _plain(name: str) -> str:
    """Without torch.compile's wrapper, and PEFT's around a module that trains in full."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _check_reach(whole: list[str], names: list[str]) -> None:
    """PEFT takes every module whose name ends with an entry of ``modules_to_save``, and then misses its weights."""
    for name in whole:
        others = [n for n in names if n.endswith(name) and n not in whole and not n.startswith(f"{name}.")]
        if others:
            raise InputError(
                f"{name!r} trained in full, but PEFT would take {others[0]!r} for it too when loading, because their "
                "names end alike; rename one of them"
            )


def _trained_outside(model: nn.Module, layers: list[AdapterLayer]) -> tuple[list[str], dict[str, Tensor]]:
    """Modules to save whole, and single trained parameters besides, by name in ``model``."""
    adapters = {id(p) for layer in layers for n, p in layer.module.named_parameters() if "base_layer" not in n}
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
