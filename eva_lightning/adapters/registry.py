"""The LoRA layers of a module: find, add and remove them, and keep PEFT's configs up to date."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from eva_lightning.adapters.adapter_layer import AdapterLayer, SkippedLayer
from eva_lightning.adapters.attention import OUT_PROJECTION
from eva_lightning.adapters.supported_layers import make_layer
from eva_lightning.adapters.targets import select
from eva_lightning.errors import InputError
from eva_lightning.side_effects import isolated_rng

CONFIG_ATTRIBUTE = "_eva_lightning_config"
"""Where layers that we inject keep their LoraConfig, so that a part of the module (``module.net``) knows it too."""

OWN_ADAPTER = "default"
"""The name of the adapter that we inject, PEFT's default."""


def find_adapters(module: nn.Module, adapter_name: str | None = None) -> dict[str, AdapterLayer]:
    """All LoRA layers of ``module`` that EVA can initialise, by canonical name, in module order.

    Args:
        module: any module; layers of PeftModels inside it are found too.
        adapter_name: the adapter wanted; by default the one that is active.

    Raises:
        InputError: several adapters are active at once and ``adapter_name`` does not say which is meant.
    """
    layers = lora_layers(module, adapter_name)
    return {layer.name: layer for layer in layers if not isinstance(layer, SkippedLayer)}


def find_skipped(module: nn.Module, adapter_name: str | None = None) -> dict[str, str]:
    """The LoRA layers of ``module`` that EVA leaves as they are, by canonical name, and why."""
    return {x.name: x.reason for x in lora_layers(module, adapter_name) if isinstance(x, SkippedLayer)}


def wanted_adapters(
    module: nn.Module, target_modules: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> dict[str, AdapterLayer]:
    """The LoRA layers of ``module`` that EVA is to initialise, by canonical name, trained or not.

    Args:
        module: with LoRA layers.
        target_modules: those wanted, matched as in :func:`eva_lightning.adapters.find_targets`; ``None``: all.
        exclude: those to leave as they are.

    Raises:
        InputError: there is none that EVA can initialise, or a name matches nothing.
    """
    layers = find_adapters(module)
    if not layers:
        reasons = [f"{n}: {why}" for n, why in list(find_skipped(module).items())[:3]]
        raise InputError(
            f"{type(module).__name__} has LoRA layers, but none that EVA can initialise"
            f" ({'; '.join(reasons) or 'no adapter is active'})"
        )
    names = list(layers) if target_modules is None else select(list(layers), target_modules, "target_modules")
    # what an earlier injection left out has no adapter now, and a name means everything under it
    modules = [n for n in map(canonical_names(module), dict(module.named_modules())) if n]
    dropped = set() if exclude is None else set(select(list(layers), exclude, "exclude", modules))
    return {n: layers[n] for n in names if n not in dropped}


def refuse_merged(layers: Mapping[str, AdapterLayer]) -> None:
    """Make sure that these layers compute with their adapters.

    Raises:
        InputError: an adapter is merged into its weight: it would not train.
    """
    merged = [name for name, layer in layers.items() if layer.module.merged]
    if merged:
        raise InputError(
            f"the adapter of layer {merged[0]!r} is merged into its weight and would not train ({len(merged)} such); "
            "call unmerge_adapter() before fit, or merge_and_unload() to begin with new adapters"
        )


def refuse_frozen(layers: Mapping[str, AdapterLayer]) -> None:
    """Make sure that these layers, whose adapters were put in to be trained, can train.

    Raises:
        InputError: an adapter was frozen since.
    """
    frozen = [name for name, layer in layers.items() if not (layer.a.requires_grad and layer.b.requires_grad)]
    if frozen:
        raise InputError(
            f"the adapter of {frozen[0]!r} ({len(frozen)} such) was frozen after it was put in and would never train; "
            "freeze layers before fit, or in a setup hook"
        )


def refuse_trained(layers: Mapping[str, AdapterLayer]) -> None:
    """Make sure that initialising these layers erases nothing.

    Raises:
        InputError: a layer is trained already.
    """
    for layer in layers.values():
        if not layer.is_fresh:
            raise InputError(
                f"layer {layer.name!r}: its LoRA matrix B is not zero, so the adapter is trained or PiSSA-like and "
                "EVA would erase it; use adapters as LoraConfig makes them by default"
            )


def lora_layers(module: nn.Module, adapter_name: str | None = None) -> list[AdapterLayer]:
    """All LoRA layers of ``module``, :class:`SkippedLayer` among them."""
    if not has_adapters(module):
        return []
    from peft.tuners.lora import LoraLayer

    canonical = canonical_names(module)
    configs = _configs(module)
    attentions = {id(m.out_proj): m for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    found: list[AdapterLayer] = []
    for path, m in module.named_modules():
        if not isinstance(m, LoraLayer):
            continue
        adapter = adapter_name or _active_adapter(m, canonical(path))
        if adapter is None or not (adapter in m.lora_A or adapter in m.lora_embedding_A):
            continue
        config = _config_of(path, adapter, configs) or getattr(m, CONFIG_ATTRIBUTE, None)
        layer = make_layer(canonical(path), path, m, adapter, config, attentions.get(id(m)))
        if config is None and not isinstance(layer, SkippedLayer):
            raise InputError(
                f"the LoRA layer {canonical(path)!r} belongs to no PeftModel and no module with a `peft_config`; make "
                "adapters with peft.get_peft_model, peft.inject_adapter_in_model or eva_lightning.adapters.inject"
            )
        found.append(layer)
    return found


def materialise(module: nn.Module) -> list[str]:
    """Give adapters on the meta device (PEFT's ``low_cpu_mem_usage=True``) the values PEFT starts them with.

    They come to the device of their base layers, in the precision they were made in; B is zero. The global generators
    are as before.

    Returns:
        The canonical names of their layers.

    Raises:
        InputError: weights of such a layer are on the meta device too, or it starts as a part of the base weight.
    """
    if not any(p.device.type == "meta" for p in module.parameters()):
        return []
    from peft.tuners.lora import LoraLayer

    canonical, configs = canonical_names(module), _configs(module)
    found = []
    for path, m in [(path, m) for path, m in module.named_modules() if isinstance(m, LoraLayer)]:
        name = canonical(path)
        for adapter in [a for a in (*m.lora_A, *m.lora_embedding_A) if _on_meta(m, a)]:
            if any(p.device.type == "meta" for n, p in m.get_base_layer().named_parameters() if ".lora_" not in n):
                raise InputError(
                    f"layer {name!r}: its weights are on the meta device, without values; build the model on a real "
                    "device, or call to_empty and load_state_dict, before fit"
                )
            config = _config_of(path, adapter, configs) or getattr(m, CONFIG_ATTRIBUTE, None)
            if config is None or config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
                start = getattr(config, "init_lora_weights", None)
                raise InputError(
                    f"layer {name!r}: its adapter is on the meta device and cannot be started there "
                    f"(init_lora_weights={start!r}); make it with low_cpu_mem_usage=False"
                )
            _start(m, adapter, config)
            found.append(name)
    return found


def _on_meta(layer: Any, adapter: str) -> bool:
    own = [(n, p) for n, p in layer.named_parameters() if n.startswith("lora_")]
    return any(p.device.type == "meta" for n, p in own if n.split(".")[1] == adapter)


def _start(layer: Any, adapter: str, config: Any) -> None:
    """PEFT's own start of an adapter, with flags and precision as they are."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention

    kept = {n: (p.dtype, p.requires_grad) for n, p in layer.named_parameters() if n.startswith("lora_")}
    modes = {n: m.training for n, m in layer.named_modules()}
    # an attention's own update_layer would start that of the output projection too, which has its turn
    update: Any = LoraLayer.update_layer if isinstance(layer, MultiheadAttention) else type(layer).update_layer
    with isolated_rng():
        update(layer, adapter, layer.r[adapter], layer.lora_alpha[adapter], config=config)
    for n, p in layer.named_parameters():
        if n in kept:
            p.data = p.data.to(kept[n][0])
            p.requires_grad_(kept[n][1])
    for n, m in layer.named_modules():
        m.training = modes.get(n, layer.training)


def has_adapters(module: nn.Module) -> bool:
    """Whether there is any adapter in ``module``, also of kinds that :func:`find_adapters` passes over."""
    return any(hasattr(m, "lora_A") and not _is_empty(m) for m in module.modules())


def unwrap_empty(module: nn.Module) -> None:
    """Put the base layer in the place of LoRA layers without any adapter, which PEFT's ``delete_adapter`` leaves."""
    for m in list(module.modules()):
        if hasattr(m, "lora_A") and _is_empty(m):
            replace_everywhere(module, m, m.get_base_layer())  # type: ignore[operator]


def replace_stale_configs(module: nn.Module, config: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Give a PeftModel that lost its adapters the config of those now inside it; returns what it had, to set back."""
    tuners = [m for m in module.modules() if any(c.__name__ in ("PeftModel", "BaseTuner") for c in type(m).__mro__)]
    groups: dict[int, Any] = {id(m.peft_config): m.peft_config for m in tuners}
    stale = [(group, dict(group)) for group in groups.values() if group.get(OWN_ADAPTER) is not config]
    for group, _ in stale:
        group[OWN_ADAPTER] = config
    return stale


def _is_empty(layer: Any) -> bool:
    return len(layer.lora_A) == 0 and len(getattr(layer, "lora_embedding_A", ())) == 0


def canonical_names(module: nn.Module) -> Callable[[str], str]:
    """A function from a name in ``module.named_modules()`` to the name without PEFT's and torch.compile's wrappers."""
    prefixes = [
        (f"{path}." if path else "") + "base_model.model."
        for path, m in module.named_modules()
        if any(c.__name__ == "PeftModel" for c in type(m).__mro__)
    ]

    def canonical(name: str) -> str:
        for prefix in sorted(prefixes, key=len, reverse=True):
            if name.startswith(prefix):
                name = prefix.removesuffix("base_model.model.") + name.removeprefix(prefix)
        return ".".join(part for part in name.split(".") if part != "_orig_mod")

    return canonical


def target_of(path: str) -> str:
    """The name of the plain layer whose injection makes a LoRA layer at ``path``: of an attention's ``out_proj``, the
    attention."""
    return path.removesuffix(OUT_PROJECTION)


def remove(module: nn.Module, layer: AdapterLayer) -> None:
    """Put the base layer back wherever ``layer`` stands in ``module``; the function computed stays W x.

    A PEFT layer that holds other adapters too stays, without this one and with none active.
    """
    if any(name != layer.adapter for name in layer.module.lora_A):
        layer.module.set_adapter([])
        layer.module.delete_adapter(layer.adapter)
        return
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
    for layer in lora_layers(module):
        groups.setdefault(id(layer.config), []).append(layer)
    for layers in groups.values():
        if all(isinstance(layer, SkippedLayer) for layer in layers):
            continue
        config = layers[0].config
        root = _config_root(module, layers[0])
        names = {layer.name: _relative(layer.path, root) for layer in layers}
        everything = [_relative(n, root) for n, _ in module.named_modules() if n.startswith(f"{root}." if root else "")]
        describe_layers(config, [(names[layer.name], layer) for layer in layers], everything)


def describe_layers(config: Any, layers: list[tuple[str, AdapterLayer]], names: list[str]) -> None:
    """Set ``target_modules``, ``rank_pattern`` and ``alpha_pattern`` of ``config`` to describe ``layers`` exactly.

    PEFT reads pattern keys as regular expressions that may match any suffix, so each key is escaped and anchored.
    Names in ``target_modules`` match suffixes too: where that would reach other modules, one regular expression takes
    the place of the names.

    Args:
        config: the LoraConfig to change.
        layers: the layers, each with its name relative to where the config belongs.
        names: those of all modules there.
    """
    layers = [(n, layer) for n, layer in layers if not n.endswith(OUT_PROJECTION)]  # its attention's entry is for both
    targets = {name for name, _ in layers}
    # what the adapters brought is not there when PEFT looks; parts of the layers themselves (parametrizations) are
    plain = [n.replace(".base_layer", "") for n in names if not re.search(r"\.lora_\w+(\.|$)", n)]
    others = [n for n in plain if n not in targets]
    ambiguous = any(n.endswith(f".{name}") for n in others for name in targets)
    config.target_modules = "|".join(re.escape(name) for name in sorted(targets)) if ambiguous else targets
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
    adapters = find_adapters(module).values()
    layers = [
        (
            {name: dict(getattr(x.module, name)) for name in ("r", "lora_alpha", "scaling", "lora_variant")},
            x.module,
        )
        for x in adapters
    ]
    configs = [(c, copy.copy(vars(c))) for c in {id(x.config): x.config for x in adapters}.values()]
    parameters = [(p, p.data.clone()) for x in adapters for p in (x.a, x.b)]
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
    active = [a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A]
    if len(active) > 1:
        raise InputError(
            f"layer {name!r} has {len(active)} active adapters {active}; activate one with set_adapter(name)"
        )
    return active[0] if active else None


def _configs(module: nn.Module) -> dict[str, Mapping[str, Any]]:
    found = {path: _peft_config(m) for path, m in module.named_modules()}
    return {path: group for path, group in found.items() if group}


def _peft_config(module: nn.Module) -> Mapping[str, Any]:
    try:
        group: Any = module.peft_config
    except Exception:  # a property of the user's that happens to have that name
        return {}
    is_peft = isinstance(group, Mapping) and all(hasattr(config, "peft_type") for config in group.values())
    return group if is_peft else {}


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
