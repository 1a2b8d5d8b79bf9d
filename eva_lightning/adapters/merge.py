"""Adapters added to the weights of their layers, checked layer by layer before anything is changed."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.attention import AttentionOutputLayer
from eva_lightning.adapters.layer_copy import remember_structure
from eva_lightning.adapters.layer_probe import (
    QUANTISED_TOLERANCE,
    difference,
    is_quantised,
    output,
    probe_inputs,
    tolerance,
    working_copy,
)
from eva_lightning.adapters.registry import lora_layers, replace_everywhere
from eva_lightning.adapters.supported_layers import is_silent
from eva_lightning.adapters.weight_reads import refuse_read_elsewhere
from eva_lightning.errors import InputError
from eva_lightning.namespaces import is_lightning_module
from eva_lightning.side_effects import isolated_rng, observing

EXAMPLE_TOLERANCE = 1e-3
"""Largest difference of a whole model's outputs, over the largest output: in its own precision, TF32 among them."""


def merge_and_unload(module: nn.Module, example: Any = None) -> nn.Module:
    """Add every active adapter to its base weight, and take all adapters out.

    Sums are made in fp64 with one rounding at the end. Every layer is checked first: a copy of it with the adapter
    merged must compute what the layer computes, within 1e-5 of the largest output before that rounding (5% with 8-bit
    and 30% with 4-bit weights, which are quantised again). Nothing is changed unless all layers pass.

    Merged weights are new parameters. A weight that was shared with another layer is so no longer, and one that was
    computed (weight_norm, spectral_norm, orthogonal, pruning) is a plain weight afterwards; both are said in a warning,
    because a ``state_dict`` of ``module`` then does not fit what it fitted before.

    Args:
        module: with LoRA layers, a PeftModel around it or in it or not.
        example: an input of ``module``; a tuple holds several arguments, a mapping those by name. With it the outputs
            of the whole module are compared too, which finds layers whose weight is read elsewhere. The old weights are
            kept until then. Default: a LightningModule's ``example_input_array``, where it has one that runs.

    Returns:
        ``module``; of a LoRA layer itself, its base layer.

    Raises:
        InputError: a layer cannot be merged: its class uses the weight in its own way, the model was seen to read its
            weight elsewhere while EVA streamed, values are NaN or infinite or on the meta device, adapters are switched
            off; names the layer. ``module`` is as it was.
    """
    # PEFT's attention layer holds that of its output projection, and merges both
    layers = [layer for layer in lora_layers(module) if not isinstance(layer, AttentionOutputLayer)]
    example = _own_example(module) if example is None else example
    for layer in layers:
        if example is None:
            refuse_read_elsewhere(
                layer,
                "keep the adapter, export it with save_pretrained, or pass example=, an input of the model, to have "
                "it merged if outputs stay",
            )
        if not is_silent(layer):
            check_merge(layer, merged_copy(layer))
    shared = _shared_weights(module)
    with _undone_unless_equal(module, example):
        changed = [owner for layer in layers for owner in _merge_in_place(module, layer)]
        _unload_the_rest(module)
        _announce(shared, changed)
        _untie_config(module)
    return layers[0].base if layers and layers[0].module is module else module


def merged_copy(layer: AdapterLayer) -> Any:
    """The layer without adapter as merging would leave it: a copy, with weights in fp64 where not quantised.

    Raises:
        InputError: it cannot be merged.
    """
    _refuse_values(layer)
    twin = working_copy(layer.module)
    with _as_input_error(layer):
        make_plain(twin.get_base_layer())
        if _is_plain_lora(layer):
            return _with_product(twin, layer.adapter)
        return _merged_by_peft(twin, layer.adapter)


def check_merge(layer: AdapterLayer, merged: nn.Module) -> None:
    """Make sure that ``merged`` computes what the layer computes.

    Raises:
        InputError: it does not, or the layer cannot be called with a plain input.
    """
    twin = working_copy(layer.module)
    inputs = probe_inputs(twin, merged)
    with _as_input_error(layer):
        # hooks on the LoRA layer see the same in both, and stay
        gap = difference(output(twin.forward, inputs), output(merged, inputs))
    if gap > tolerance(merged):
        raise InputError(
            f"layer {layer.name!r} cannot be merged: with the adapter added to its weight its output differs by "
            f"{gap:.2g} of the largest value (at most {tolerance(merged):g}), because {type(layer.base).__name__} or a "
            "hook on it uses the weight in its own way; keep the adapter, or export it with save_pretrained"
        )
    for name, value in merged.named_parameters():
        if not torch.isfinite(value.to(_dtype_of(layer.base, value))).all():
            raise InputError(
                f"layer {layer.name!r} cannot be merged: {name} would be NaN or infinite in "
                f"{_dtype_of(layer.base, value)}; convert the module to float32 first"
            )


def make_plain(base: nn.Module) -> bool:
    """Give a layer whose ``weight`` is computed from other tensors that weight as a parameter; whether it was one.

    Raises:
        InputError: it is computed in a way that torch has no name for, or the bias is computed too.
    """
    if "weight" in base._parameters or isinstance(base, nn.MultiheadAttention) or not hasattr(base, "weight"):
        return False
    if parametrize.is_parametrized(base):
        if not parametrize.is_parametrized(base, "weight") or len(base.parametrizations) > 1:  # type: ignore[arg-type]
            raise InputError("more than its weight is parametrised; call parametrize.remove_parametrizations first")
        _own_parameters(base.parametrizations.weight)  # type: ignore[union-attr, arg-type]
        _own_class(base)
        parametrize.remove_parametrizations(base, "weight")
        if "weight" in base._buffers:  # torch's choice where all that it was computed from is frozen
            weight: Any = base._buffers.pop("weight")
            base.weight = nn.Parameter(weight.detach(), False)
    for hook in list(base._forward_pre_hooks.values()):
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == "weight":
            remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
            remove(base)
        elif isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            _own_parameters(base)
            prune.remove(base, "weight")
    if "weight" not in base._parameters:
        raise InputError(f"the weight of {type(base).__name__} is computed, and not by torch.nn.utils")
    return True


def _own_parameters(module: nn.Module) -> None:
    """Parameters with the same values that nothing else holds: torch writes into them when it removes its norms."""
    for name, p in list(module._parameters.items()):
        if p is not None:
            module._parameters[name] = nn.Parameter(p.detach(), p.requires_grad)


def _own_class(module: nn.Module) -> None:
    """A class like that of a parametrised module, which torch takes the weight off: copies share theirs."""
    kind = type(module)
    attributes = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, attributes)


def _is_plain_lora(layer: AdapterLayer) -> bool:
    """Whether nothing but ``scaling * B A`` is to be added: PEFT's own merge fails for 1 x 1 x 1 convolutions."""
    m, adapter = layer.module, layer.adapter
    special = adapter in m.lora_variant or m.merged_adapters or is_quantised(m.get_base_layer())
    return type(layer) is AdapterLayer and not special and m.lora_B[adapter].bias is None


def _with_product(layer: Any, adapter: str) -> nn.Module:
    base = layer.get_base_layer()
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    delta = layer.scaling[adapter] * b.flatten(1) @ a.flatten(1)
    delta = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    base.weight = nn.Parameter(base.weight.detach() + delta.reshape(base.weight.shape), False)
    return base


def _merged_by_peft(layer: Any, adapter: str) -> nn.Module:
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=[adapter])
    layer.merge(safe_merge=True, adapter_names=[adapter])
    return layer.get_base_layer()


@contextmanager
def _as_input_error(layer: AdapterLayer) -> Iterator[None]:
    """PEFT and users' layers raise all kinds of errors; all of them mean that this layer cannot be merged."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"layer {layer.name!r} cannot be merged: {kind}{error}") from error


def _refuse_values(layer: AdapterLayer) -> None:
    """Raise for what no copy is needed to know."""
    where = f"layer {layer.name!r} cannot be merged"
    if type(layer.module).__name__ == "ParamWrapper":
        raise InputError(f"{where}: it is LoRA on single parameters (target_parameters); use PEFT's merge_and_unload")
    if layer.module.disable_adapters:
        raise InputError(f"{where}: its adapter is switched off; call enable_adapter_layers() or unload it with PEFT")
    for name, p in layer.module.named_parameters():
        if p.device.type == "meta":
            raise InputError(f"{where}: {name} is on the meta device, without values; load the weights first")
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise InputError(
                f"{where}: {name} has NaN or infinite values, as after a diverged run; go back to an earlier checkpoint"
            )


def _merge_in_place(module: nn.Module, layer: AdapterLayer) -> list[tuple[nn.Module, str, bool]]:
    """Merge one layer and put its base layer in its place; what has new parameters, and whether it was computed."""
    base: Any = layer.base
    changed: list[tuple[nn.Module, str, bool]] = []
    if is_silent(layer):
        pass
    elif is_quantised(base):
        _merged_by_peft(layer.module, layer.adapter)
    else:
        merged = merged_copy(layer)
        # first, because PEFT's attention layer cannot be walked without its parts
        replace_everywhere(module, layer.module, base)
        if isinstance(base, nn.MultiheadAttention):
            projection: Any = base.out_proj
            _hand_over_hooks(projection, projection.get_base_layer())
            base.out_proj = projection.get_base_layer()
        trains = any(p.requires_grad for n, p in base.named_parameters() if n != "bias")
        computed = make_plain(base)
        changed = [(owner, name, computed) for owner, name in _take_over(base, merged)]
        if computed:
            base.weight.requires_grad_(trains)
    _hand_over_hooks(layer.module, base)
    replace_everywhere(module, layer.module, base)
    return changed


def _take_over(base: nn.Module, merged: nn.Module) -> list[tuple[nn.Module, str]]:
    """New parameters in ``base`` for those that have another value in ``merged``; where they stand."""
    changed = []
    for path, value in merged.named_parameters():
        parent, _, name = path.rpartition(".")
        owner = base.get_submodule(parent)
        old: Any = owner._parameters[name]
        new = value.detach().to(old.dtype)
        if not torch.equal(new, old):
            owner._parameters[name] = nn.Parameter(new, old.requires_grad)
            vars(owner._parameters[name]).update(vars(old))
            changed.append((owner, name))
    return changed


def _dtype_of(base: Any, value: Tensor) -> torch.dtype:
    """Of the layer's weights."""
    return next((p.dtype for p in base.parameters() if p.is_floating_point()), value.dtype)


def _hand_over_hooks(layer: nn.Module, base: nn.Module) -> None:
    """Hooks that users registered on a LoRA layer stay, after those of its base layer; our own go."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        theirs, held = getattr(layer, name), getattr(base, name)
        for key, hook in list(theirs.items()):
            if str(getattr(hook, "__module__", "")).startswith("eva_lightning."):
                del theirs[key]
        if theirs and not held:
            setattr(base, name, theirs)  # the same dictionary, so that handles still remove their hooks
        else:
            held.update(theirs)
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
        getattr(base, name).update(getattr(layer, name))
    if base._is_full_backward_hook is None:
        base._is_full_backward_hook = layer._is_full_backward_hook


def _unload_the_rest(module: nn.Module) -> None:
    """Base layers for LoRA layers without an active adapter, which compute the same."""
    from peft.tuners.lora import LoraLayer

    for m in list(module.modules()):
        if isinstance(m, LoraLayer) and not isinstance(m.get_base_layer(), nn.MultiheadAttention):
            replace_everywhere(module, m, m.get_base_layer())


def _shared_weights(module: nn.Module) -> Mapping[tuple[int, str], list[str]]:
    """By the module that holds a parameter and its name there: the other places that use the same memory."""
    places: dict[Any, list[tuple[nn.Module, str, str]]] = defaultdict(list)
    for path, m in module.named_modules():
        plain = ".".join(part for part in path.split(".") if part != "base_layer")
        for name, p in m._parameters.items():
            if p is not None and p.numel() and p.device.type != "meta":
                places[p.data_ptr()].append((m, name, f"{plain}.{name}" if plain else name))
    return {
        (id(m), name): [other for _, _, other in group if other != path]
        for group in places.values()
        for m, name, path in group
        if len(group) > 1
    }


def _announce(shared: Mapping[tuple[int, str], list[str]], changed: list[tuple[nn.Module, str, bool]]) -> None:
    untied = sorted({other for m, name, _ in changed for other in shared.get((id(m), name), [])})
    if untied:
        warnings.warn(
            f"merging gave layers that shared a weight one each; it was shared by {', '.join(untied)}. Outputs stay, "
            "but a state_dict of this module does not fit a module that shares them",
            stacklevel=3,
        )
    if any(computed for _, _, computed in changed):
        warnings.warn(
            "merging made weights that were computed (weight_norm, spectral_norm, a parametrization, pruning) plain "
            "ones: outputs in eval mode stay, but the names in the state_dict are those of plain layers",
            stacklevel=3,
        )


def _untie_config(module: nn.Module) -> None:
    """Keep transformers from tying embeddings that are different now when it saves and loads the model."""
    for m in module.modules():
        config = getattr(m, "config", None)
        if getattr(config, "tie_word_embeddings", False) is True and hasattr(m, "get_output_embeddings"):
            first, last = m.get_input_embeddings(), m.get_output_embeddings()  # type: ignore[operator]
            if first is not None and last is not None and first.weight.data_ptr() != last.weight.data_ptr():
                config.tie_word_embeddings = False  # type: ignore[union-attr]


@contextmanager
def _undone_unless_equal(module: nn.Module, example: Any) -> Iterator[None]:
    """Compare the module's outputs for ``example``, where there is one, before and after the body."""
    if example is None:
        yield
        return
    before, restore = outputs(module, example), remember_structure(module)
    try:
        yield
        gap = max((difference(a, b) for a, b in zip(before, outputs(module, example), strict=True)), default=0.0)
        if gap > (bound := _example_tolerance(module)):
            raise InputError(
                f"{type(module).__name__} cannot be merged: its output for the example would differ by {gap:.2g} of "
                f"the largest value (at most {bound:.2g}); a weight of an adapted layer is used elsewhere too"
            )
    except BaseException:
        restore()
        raise


def _example_tolerance(module: nn.Module) -> float:
    """Merged weights are rounded once: in half precisions and quantised layers that shows in the output."""
    if is_quantised(module):
        return max(QUANTISED_TOLERANCE.values())
    rounding = [torch.finfo(p.dtype).eps for p in module.parameters()]
    return max([EXAMPLE_TOLERANCE, *(8 * eps for eps in rounding)])


def _own_example(module: Any) -> Any:
    """The ``example_input_array`` of a LightningModule, on its device, if ``forward`` takes it."""
    example = module.example_input_array if is_lightning_module(module) else None
    if example is None:
        return None
    try:
        example = module.transfer_batch_to_device(example, module.device, 0)
        outputs(module, example)
    except Exception:  # nobody promised that it fits
        return None
    return example


def outputs(module: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that ``module`` returns for ``example``, in eval mode and without side effects."""
    with torch.no_grad(), isolated_rng(), observing(module):
        torch.manual_seed(0)
        if isinstance(example, Mapping):
            return tensors_in(module(**example))
        return tensors_in(module(*example) if isinstance(example, tuple) else module(example))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested sequences and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (list, tuple)) else []
