"""The LoRA layers of a module: their names, ranks and scalings, and how to change them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONFIG_ATTRIBUTE = "_eva_lightning_config"
"""Where layers that we inject keep their LoraConfig, so that a part of the module (``module.net``) knows it too."""


@dataclass(frozen=True)
class AdapterLayer:
    """One LoRA layer: ``W x + scaling * B A x`` with A (rank, in_features) and B (out_features, rank).

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

    @property
    def rank(self) -> int:
        return int(self.module.r[self.adapter])

    @property
    def alpha(self) -> float:
        return float(self.module.lora_alpha[self.adapter])

    @property
    def in_features(self) -> int:
        return int(self.module.lora_A[self.adapter].in_features)

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
        # "eva" is PEFT's word for "B = 0 and leave A alone"; other values would run their own initialisation here
        config.init_lora_weights = "eva"
        layer.update_layer(adapter, rank, alpha, config=config)
        for n, p in layer.named_parameters():
            if n in kept:
                dtype, flag, data = kept[n]
                p.data = data if n.startswith("lora_magnitude_vector") else p.data.to(dtype)
                p.requires_grad_(flag)
        for n, m in layer.named_modules():
            m.training = modes.get(n, layer.training)

    def reset_magnitude(self) -> None:
        """Set DoRA's magnitude to the norm its forward pass computes, in that precision; nothing for other adapters.

        A magnitude computed in fp32 and rounded to bf16 later is not the norm of the rounded weight: the adapter
        would change the function before any training.
        """
        if self.adapter in self.module.lora_magnitude_vector:
            dora = self.module.lora_magnitude_vector[self.adapter]
            weight: Any = self.base.weight.data
            dora.weight.data = dora.get_weight_norm(weight, torch.zeros_like(weight), 1.0).to(dora.weight.dtype)

    def write(self, a: Tensor) -> None:
        """Set A to ``a`` (rank, in_features), rounded to the parameter's dtype, and B (and its bias) to zero."""
        if tuple(a.shape) != tuple(self.a.shape):
            raise ValueError(f"layer {self.name!r}: A has shape {tuple(self.a.shape)}, got {tuple(a.shape)}")
        with torch.no_grad():
            if self.a.device.type != "meta":
                self.a.copy_(a)
            self.b.zero_()
            bias = self.module.lora_B[self.adapter].bias
            if bias is not None:
                bias.zero_()


def find_adapters(module: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterLayer]:
    """All LoRA layers of ``module`` whose A and B are plain matrices, by canonical name, in module order.

    LoRA on convolutions, embeddings and MultiheadAttention, and AdaLoRA's layers, are passed over.

    Args:
        module: any module; layers of PeftModels inside it are found too.
        adapter_name: the adapter wanted; by default the one that is active.

    Raises:
        ValueError: several adapters are active at once and ``adapter_name`` does not say which is meant.
    """
    if not has_adapters(module):
        return {}
    from peft.tuners.lora import LoraLayer

    canonical = canonical_names(module)
    configs = _configs(module)
    found: dict[str, AdapterLayer] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        adapter = adapter_name or _active_adapter(layer, canonical(path))
        if adapter is None or not isinstance(dict(layer.lora_A.items()).get(adapter), nn.Linear):
            continue
        if isinstance(layer.get_base_layer(), (nn.Embedding, nn.MultiheadAttention)):
            continue
        config = _config_of(path, adapter, configs) or getattr(layer, CONFIG_ATTRIBUTE, None)
        if config is None:
            raise ValueError(
                f"the LoRA layer {canonical(path)!r} belongs to no PeftModel and no module with a `peft_config`; make "
                "adapters with peft.get_peft_model, peft.inject_adapter_in_model or eva_lightning.adapters.inject"
            )
        found[canonical(path)] = AdapterLayer(canonical(path), path, layer, adapter, config)
    return found


def has_adapters(module: nn.Module) -> bool:
    """Whether there is any LoRA layer in ``module``, also of kinds that :func:`find_adapters` passes over."""
    return any(hasattr(m, "lora_A") for m in module.modules())


def canonical_names(module: nn.Module) -> Any:
    """A function from a name in ``module.named_modules()`` to the name without PEFT's and torch.compile's wrappers."""
    prefixes = [
        (f"{path}." if path else "") + "base_model.model."
        for path, m in module.named_modules()
        if hasattr(m, "peft_config") and hasattr(m, "base_model") and hasattr(m, "get_base_model")
    ]

    def canonical(name: str) -> str:
        for prefix in sorted(prefixes, key=len, reverse=True):
            if name.startswith(prefix):
                name = prefix.removesuffix("base_model.model.") + name.removeprefix(prefix)
        return ".".join(part for part in name.split(".") if part != "_orig_mod")

    return canonical


def remove(module: nn.Module, layer: AdapterLayer) -> None:
    """Put the base layer back wherever ``layer`` stands in ``module``; the function computed stays W x."""
    replace_everywhere(module, layer.module, layer.base)


def replace_everywhere(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the child ``old`` by ``new`` under every parent that holds it (shared layers have several)."""
    for parent in list(module.modules()):
        if parent is new or parent is old:
            continue
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def sync_configs(module: nn.Module) -> None:
    """Write the layers' ranks, alphas and names into their LoraConfigs, so that PEFT saves what is there."""
    groups: dict[int, list[AdapterLayer]] = {}
    for layer in find_adapters(module).values():
        groups.setdefault(id(layer.config), []).append(layer)
    for layers in groups.values():
        config = layers[0].config
        root = _config_root(module, layers[0])
        names = {layer.name: _relative(layer.path, root) for layer in layers}
        describe_layers(config, [(names[layer.name], layer) for layer in layers])


def describe_layers(config: Any, layers: list[tuple[str, AdapterLayer]]) -> None:
    """Set ``target_modules``, ``rank_pattern`` and ``alpha_pattern`` of ``config`` to describe ``layers`` exactly.

    PEFT reads pattern keys as regular expressions that may match any suffix, so each key is escaped and anchored.
    """
    config.target_modules = {name for name, _ in layers}
    config.rank_pattern = {_anchored(n): layer.rank for n, layer in layers if layer.rank != config.r}
    config.alpha_pattern = {_anchored(n): layer.alpha for n, layer in layers if layer.alpha != config.lora_alpha}


@contextmanager
def disabled(layers: Iterable[AdapterLayer]) -> Iterator[None]:
    """The module without these adapters, for the duration of the body.

    With B = 0 they change nothing, but they cost: DoRA forms a full weight matrix in every call.
    """
    switched = [layer.module for layer in layers if not layer.module.disable_adapters]
    flags = [(p, p.requires_grad) for layer in switched for p in layer.parameters()]
    try:
        for layer in switched:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def restored_on_failure(module: nn.Module) -> Iterator[None]:
    """Undo every change made to the LoRA layers of ``module`` if the body raises, Ctrl-C included."""
    parents = [(m, dict(m._modules)) for m in module.modules()]
    layers = [
        (
            {name: dict(getattr(x.module, name)) for name in ("r", "lora_alpha", "scaling", "lora_variant")},
            x.module,
        )
        for x in find_adapters(module).values()
    ]
    configs = [(c, copy.copy(vars(c))) for group in _configs(module).values() for c in group.values()]
    parameters = [(p, p.data.clone()) for x in find_adapters(module).values() for p in (x.a, x.b)]
    try:
        yield
    except BaseException:
        for m, children in parents:
            m._modules.clear()
            m._modules.update(children)
        for values, layer in layers:
            for name, value in values.items():
                getattr(layer, name).clear()
                getattr(layer, name).update(value)
        for config, values in configs:
            vars(config).update(values)
        for p, data in parameters:
            p.data = data
        raise


def _anchored(name: str) -> str:
    return "^" + re.escape(name)


def _relative(path: str, root: str) -> str:
    inner = path.removeprefix(f"{root}.") if root else path
    return ".".join(part for part in inner.split(".") if part != "_orig_mod")


def _active_adapter(layer: Any, name: str) -> str | None:
    active = [a for a in layer.active_adapters if a in layer.lora_A]
    if len(active) > 1:
        raise ValueError(
            f"layer {name!r} has {len(active)} active adapters {active}; activate one with set_adapter(name)"
        )
    return active[0] if active else None


def _configs(module: nn.Module) -> dict[str, Mapping[str, Any]]:
    return {
        path: m.peft_config
        for path, m in module.named_modules()
        if isinstance(getattr(m, "peft_config", None), Mapping) and m.peft_config
    }


def _config_of(path: str, adapter: str, configs: Mapping[str, Mapping[str, Any]]) -> Any:
    owners = [root for root, group in configs.items() if adapter in group and (not root or path.startswith(f"{root}."))]
    return configs[max(owners, key=len)][adapter] if owners else None


def _config_root(module: nn.Module, layer: AdapterLayer) -> str:
    """The path of the innermost module that holds the layer's config: what PEFT takes names relative to."""
    roots = [
        root
        for root, group in _configs(module).items()
        if any(c is layer.config for c in group.values()) and (not root or layer.path.startswith(f"{root}."))
    ]
    return max(roots, key=len, default="")


def add_layers(module: nn.Module, paths: list[str]) -> None:
    """Give layers of a module that has adapters already one of their own: a checkpoint has more than the module."""
    if not paths:
        return
    from peft import inject_adapter_in_model

    from eva_lightning.isolation import isolated_rng

    layers = find_adapters(module)
    template = next(iter(layers.values()))
    config = copy.deepcopy(template.config)
    config.target_modules = list(paths)
    config.rank_pattern, config.alpha_pattern, config.modules_to_save = {}, {}, None
    config.init_lora_weights = True
    flags = [(p, p.requires_grad) for p in module.parameters()]
    owners = [(m, vars(m)["peft_config"]) for m in module.modules() if "peft_config" in vars(m)]
    with isolated_rng():
        inject_adapter_in_model(config, module, adapter_name=template.adapter)
    vars(module).pop("peft_config", None)
    for m, group in owners:
        vars(m)["peft_config"] = group
    for p, flag in flags:
        p.requires_grad_(flag)
