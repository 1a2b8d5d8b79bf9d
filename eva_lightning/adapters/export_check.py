"""An exported adapter, loaded by stock PEFT into a copy of the base model and compared with the model it came from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.attention import AttentionOutputLayer
from eva_lightning.adapters.base_weight_init import INITIAL_A, INITIAL_B
from eva_lightning.adapters.layer_copy import independent_copy
from eva_lightning.adapters.layer_probe import difference, output, probe_inputs, tolerance, working_copy
from eva_lightning.adapters.merge import EXAMPLE_TOLERANCE, outputs
from eva_lightning.adapters.quantised import announce_quantisation
from eva_lightning.adapters.registry import lora_layers, replace_everywhere
from eva_lightning.errors import InputError
from eva_lightning.side_effects import isolated_rng

ROOT = "base_model.model."
"""What PEFT puts before names in its files."""


def check_export(model: nn.Module, folder: Path, layers: list[AdapterLayer], example: Any = None) -> None:
    """Make sure that stock PEFT makes of ``folder`` and the base model what ``model`` is.

    Every adapted layer is run on a probe in both, and every other parameter and buffer compared bit for bit. Values
    that the folder holds are other ones in the copy before it is loaded.

    Args:
        model: with the adapters.
        folder: what was exported.
        layers: the LoRA layers of ``model``.
        example: an input to compare whole outputs for.

    Raises:
        InputError: PEFT cannot load it, or something differs; says what. Or ``model`` cannot be copied.
    """
    from peft import PeftModel

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        written = {key.removeprefix(ROOT).replace(".base_layer.", ".") for key in file.keys()}  # noqa: SIM118
    try:
        base = base_copy(model, written)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied to verify the export ({type(error).__name__}: {error}); "
            "verify=False saves it unverified"
        ) from error
    with isolated_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        announce_quantisation(base)
        try:
            loaded = PeftModel.from_pretrained(base, str(folder), torch_device="cpu").eval()
        except Exception as error:
            raise InputError(
                f"stock PEFT cannot load this export: {type(error).__name__}: {error}; nothing was written. Keep a "
                "Lightning checkpoint, or merge_and_unload and save the whole module"
            ) from error
    peft_model: Any = loaded.get_base_model()
    modules = {id(layer.module) for layer in layers}
    names = model.named_modules(remove_duplicate=False)
    _compare_values(model, peft_model, {plain_name(path) for path, m in names if id(m) in modules})
    for layer in layers:
        if not isinstance(layer, AttentionOutputLayer):
            _compare_layer(model, peft_model, layer)
    if example is not None:
        pairs = zip(outputs(model, example), outputs(loaded, example), strict=True)
        gap = max((difference(a, b) for a, b in pairs), default=0.0)
        if gap > EXAMPLE_TOLERANCE:
            raise _differs("its output for the example", gap)


def base_copy(model: nn.Module, written: set[str]) -> nn.Module:
    """The module as it is without adapters, with other values wherever the export is to bring its own.

    Args:
        model: with adapters; its memory is shared where nothing is written.
        written: names of parameters and buffers that the export holds.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    copied = independent_copy(model, [*model.parameters(), *model.buffers()])
    for layer in lora_layers(copied):
        if hasattr(layer.module, INITIAL_A):
            _give_back_start(layer)
    parts: list[Any] = list(copied.modules())
    for m in parts:
        if isinstance(m, AuxiliaryTrainingWrapper):
            replace_everywhere(copied, m, m.original_module)
        elif hasattr(m, "_orig_mod"):
            replace_everywhere(copied, m, m._orig_mod)
    adapted: list[Any] = [m for m in copied.modules() if isinstance(m, LoraLayer)]
    for m in adapted:
        base: Any = m.get_base_layer()
        replace_everywhere(copied, m, base)
        if isinstance(base, nn.MultiheadAttention):
            output: Any = base.out_proj
            base.out_proj = output.get_base_layer()
    for name, tensor in _tensors(copied):
        if name in written:
            tensor.data = ~tensor if tensor.dtype == torch.bool else tensor + 1
    return copied


def plain_name(name: str) -> str:
    """Without torch.compile's wrapper, and PEFT's around a module that trains in full."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _give_back_start(layer: AdapterLayer) -> None:
    """The base weight with what PiSSA and the like took out of it."""
    base: Any = layer.base
    a, b = getattr(layer.module, INITIAL_A).float(), getattr(layer.module, INITIAL_B).float()
    delta = layer.module.scaling[layer.adapter] * b @ a
    base.weight.data = (base.weight.float() + (delta.T if layer.module.fan_in_fan_out else delta)).to(base.weight.dtype)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _values(model: nn.Module, adapted: set[str]) -> dict[str, Tensor]:
    """What a model computes with, by plain name, without adapters and the weights of adapted layers."""
    from peft.utils.other import ModulesToSaveWrapper

    # by name, because a parameter may be shared with a module that is in use
    unused = tuple(f"{p}.original_module." for p, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))
    hidden = {
        id(tensor)
        for m in model.modules()
        if hasattr(m, "lora_A")
        for name, tensor in _tensors(m)
        if name.startswith(("lora_", INITIAL_A, INITIAL_B))
    }
    found = {}
    for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        name = plain_name(path).replace(".base_layer.", ".")
        parent, _, last = name.rpartition(".")
        computed = last in ("weight", "in_proj_weight") and parent.removesuffix(".out_proj") in adapted
        if id(tensor) not in hidden and not computed and not path.startswith(unused):
            found[name] = tensor
    return found


def _compare_values(model: nn.Module, loaded: nn.Module, adapted: set[str]) -> None:
    here, there = _values(model, adapted), _values(loaded, adapted)
    for name in sorted(here.keys() | there.keys()):
        if name not in here or name not in there:
            raise InputError(
                f"stock PEFT would load this export differently: {name!r} is only in the "
                f"{'loaded' if name in there else 'trained'} model; nothing was written"
            )
        a, b = here[name].detach(), there[name].detach()
        if a.shape != b.shape or not torch.equal(a.float().cpu().nan_to_num(), b.float().cpu().nan_to_num()):
            raise _differs(repr(name), difference(a.float(), b.float()))


def _compare_layer(model: nn.Module, loaded: nn.Module, layer: AdapterLayer) -> None:
    """Under each of its names: a layer that stands in several places has to be adapted in all."""
    ours = working_copy(layer.module)
    inputs = probe_inputs(ours, layer.base)
    for path, m in model.named_modules(remove_duplicate=False):
        if m is not layer.module:
            continue
        name = plain_name(path)
        theirs = working_copy(loaded.get_submodule(name))
        try:
            gap = difference(output(ours.forward, inputs), output(theirs, inputs))
        except Exception as error:
            raise InputError(
                f"the export cannot be verified: layer {name!r} cannot be called alone ({type(error).__name__}: "
                f"{error}); verify=False saves it unverified"
            ) from error
        if gap > tolerance(layer.base):
            raise _differs(f"layer {name!r}", gap)


def _differs(what: str, gap: float) -> InputError:
    return InputError(
        f"stock PEFT would load this export differently: {what} would differ by {gap:.2g} of the largest value; "
        "nothing was written. Keep a Lightning checkpoint, or merge_and_unload and save the whole module"
    )
