"""Lightning checkpoints with redistributed ranks: save what a fresh module needs to load them, and fit it to them.

Lightning restores the weights of a module before the state of its callbacks, so a module built with uniform ranks
would meet weights of other shapes. Here the module's LoRA layers are made to fit the checkpoint first: created,
resized or removed. That happens in ``on_load_checkpoint``, which Lightning calls with the whole checkpoint before
``load_state_dict``, in ``fit``, ``validate``, ``test``, ``predict`` and ``load_from_checkpoint`` alike.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.core import saving
from torch import Tensor, nn

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.adapters.adalora import is_adalora
from eva_lightning.adapters.registry import add_layers, remove, restored_on_failure, sync_configs, target_of
from eva_lightning.errors import InputError

KEY = "eva_lightning"
"""Where a checkpoint keeps the description of its adapters."""

_DONE = "_eva_lightning_done"
_A_KEY = re.compile(r"^(?P<path>.+)\.lora_A\.(?P<adapter>[^.]+)\.weight$")

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)


def mark_done(module: nn.Module, how: str) -> None:
    """Note on the module itself that its adapters are set: "initialised" by EVA, or "restored" from a checkpoint."""
    setattr(module, _DONE, how)


def done(module: nn.Module) -> str | None:
    """What :func:`mark_done` noted, or ``None``."""
    return getattr(module, _DONE, None)


def describe(module: nn.Module, injection: Mapping[str, Any], adapter_only: bool) -> dict[str, Any]:
    """What a fresh module needs to know to fit this module's weights: primitives only (``weights_only`` loading).

    Args:
        module: with its adapters.
        injection: the arguments for :func:`eva_lightning.adapters.inject`.
        adapter_only: whether the frozen weights are left out, which adds their fingerprint.
    """
    layers = find_adapters(module).values()
    return {
        "version": 1,
        "adapters": {layer.path: {"rank": layer.rank, "alpha": layer.alpha} for layer in layers},
        "injection": dict(injection),
        "trains": [_plain(n) for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n],
        "done": done(module),
        "base_fingerprint": base_fingerprint(module) if adapter_only else None,
    }


def save_into(checkpoint: dict[str, Any], module: pl.LightningModule, description: dict[str, Any]) -> None:
    """Add the description to a checkpoint about to be written, and name our function as the one to rebuild with."""
    checkpoint[KEY] = description
    if description["base_fingerprint"] is not None:
        frozen = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
    hparams = checkpoint.get(module.CHECKPOINT_HYPER_PARAMS_KEY, {})
    name = checkpoint.pop(module.CHECKPOINT_HYPER_PARAMS_NAME, None)
    if name == "kwargs" or name is None:
        hparams = dict(hparams)
    else:
        # hyper-parameters kept under one argument's name would hide the instantiator from Lightning
        hparams = {name: hparams}
        checkpoint.pop(module.CHECKPOINT_HYPER_PARAMS_TYPE, None)
    cli = "_instantiator" in hparams
    hparams["_instantiator"] = f"{__name__}.{'instantiate_cli' if cli else 'instantiate'}"
    checkpoint[module.CHECKPOINT_HYPER_PARAMS_KEY] = hparams


class _DescribedSaving:
    """``on_save_checkpoint`` of a module with adapters: writes their description into every checkpoint of it.

    It lives on the module, not in the callback, because Lightning calls no callback for ``save_weights_only``, and
    another Trainer may save the module. A class, so that the module can still be pickled and copied.
    """

    def __init__(self, module: pl.LightningModule, injection: Mapping[str, Any], adapter_only: bool) -> None:
        self.module, self.injection, self.adapter_only = module, dict(injection), adapter_only

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if find_adapters(self.module) or is_adalora(self.module):
            save_into(checkpoint, self.module, describe(self.module, self.injection, self.adapter_only))
        type(self.module).on_save_checkpoint(self.module, checkpoint)


def describe_on_save(module: pl.LightningModule, injection: Mapping[str, Any], adapter_only: bool = False) -> None:
    """Have every checkpoint of ``module`` say what its adapters are, so that a fresh module can load it.

    Args:
        module: with adapters, now or by the time it is saved.
        injection: the arguments for :func:`eva_lightning.adapters.inject` that a fresh module needs.
        adapter_only: leave frozen weights out of the checkpoints.
    """
    vars(module)["on_save_checkpoint"] = _DescribedSaving(module, injection, adapter_only)


def stop_describing(module: pl.LightningModule) -> None:
    """Undo :func:`describe_on_save`."""
    vars(module).pop("on_save_checkpoint", None)


def instantiate(cls: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Build a module for ``load_from_checkpoint`` that will fit itself to the checkpoint (Lightning's instantiator)."""
    module = cls(**kwargs)
    if isinstance(module, pl.LightningModule):
        watch_loading(module)
    return module


def instantiate_cli(cls: Any, kwargs: dict[str, Any]) -> Any:
    """As :func:`instantiate`, for modules that LightningCLI built."""
    from lightning.pytorch.cli import instantiate_module

    module = instantiate_module(cls, kwargs)
    watch_loading(module)
    return module


def _trust_ourselves() -> None:
    # Lightning >= 2.6 asks instantiators to be allowed by name before a checkpoint may call them
    allowed = getattr(saving, "_ALLOWED_INSTANTIATORS", None)
    names = {f"{__name__}.instantiate", f"{__name__}.instantiate_cli"}
    if isinstance(allowed, set):
        allowed |= names
    elif allowed is not None:
        saving._ALLOWED_INSTANTIATORS = type(allowed)((*allowed, *names))


_trust_ourselves()


def load_from_checkpoint(cls: type[ModuleT], checkpoint_path: str | os.PathLike[str], **kwargs: Any) -> ModuleT:
    """``cls.load_from_checkpoint`` for any checkpoint with adapters, also those saved with ``save_weights_only``.

    ``cls.load_from_checkpoint(path)`` does the same for full checkpoints written under an EVAInitCallback.
    """

    def on_load_checkpoint(self: ModuleT, checkpoint: dict[str, Any]) -> None:
        fit_to_checkpoint(self, checkpoint)
        cls.on_load_checkpoint(self, checkpoint)

    namespace = {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__}
    reader: type[ModuleT] = type(cls.__name__, (cls,), namespace)
    module = reader.load_from_checkpoint(os.fspath(checkpoint_path), **kwargs)
    module.__class__ = cls
    return module


def watch_loading(
    module: pl.LightningModule,
    injection: Mapping[str, Any] | None = None,
    changed: Callable[[], None] | None = None,
) -> Callable[[], None]:
    """Fit ``module`` to the next checkpoint it loads, once; returns a function that stops watching.

    Args:
        module: about to load a checkpoint, perhaps.
        injection: arguments for :func:`eva_lightning.adapters.inject`, for checkpoints that do not hold their own.
        changed: called after the module's parameters were replaced.
    """
    if "on_load_checkpoint" in vars(module):
        return lambda: None
    original = module.on_load_checkpoint

    def stop() -> None:
        vars(module).pop("on_load_checkpoint", None)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        stop()
        if fit_to_checkpoint(module, checkpoint, injection) and changed is not None:
            changed()
        original(checkpoint)

    vars(module)["on_load_checkpoint"] = on_load_checkpoint
    return stop


def fit_to_checkpoint(
    module: nn.Module, checkpoint: dict[str, Any], injection: Mapping[str, Any] | None = None
) -> bool:
    """Make the LoRA layers of ``module`` those of ``checkpoint``, so that its weights load; returns whether it has any.

    Frozen weights that an adapter-only checkpoint left out are filled in from the module.

    Raises:
        InputError: the checkpoint's adapters belong to layers this module does not have, the base weights are not
            those the adapters were trained on, or the module has adapters and the checkpoint none.
    """
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    incoming = {m["path"]: int(t.shape[0]) for k, t in weights.items() if (m := _A_KEY.match(k))}
    description = checkpoint.get(KEY) or {}
    present = {layer.path: layer for layer in find_adapters(module).values()}
    if not incoming and (description.get("injection") or {}).get("adalora") is not None:
        _fit_to_adalora(module, weights, description)
        return True
    if not incoming:
        if present:
            raise InputError(
                f"the checkpoint holds no adapters but {type(module).__name__} has {len(present)} LoRA layers; load a "
                "checkpoint of the base model into the module before fit, without ckpt_path"
            )
        return False
    known = dict(module.named_modules(remove_duplicate=False))
    first: dict[int, str] = {}
    for path, m in known.items():
        first.setdefault(id(m), path)
    # a layer under several names has its weights in the checkpoint as often
    incoming = {first[id(known[path])] if path in known else path: rank for path, rank in incoming.items()}
    targets = [path for path in incoming if target_of(path) == path]
    unknown = [path for path in targets if path not in known]
    if unknown:
        raise InputError(
            f"the checkpoint has an adapter on {unknown[0]!r} ({len(unknown)} such), which {type(module).__name__} "
            "lacks: it is of another model"
        )
    alphas = {path: entry["alpha"] for path, entry in description.get("adapters", {}).items()}
    if not present:
        arguments = description.get("injection", injection)
        if arguments is None:
            raise InputError(
                f"the checkpoint does not say how its adapters were made, and {type(module).__name__} has none: give "
                "it adapters of the same r and alpha first (eva_lightning.adapters.inject)"
            )
        inject(module, **{**arguments, "target_modules": targets, "exclude": None})
        present = {layer.path: layer for layer in find_adapters(module).values()}
    with restored_on_failure(module):
        add_layers(module, [path for path in targets if path not in present])
        for layer in find_adapters(module).values():
            if layer.path not in incoming:
                remove(module, layer)
            elif layer.rank != incoming[layer.path] or layer.alpha != alphas.get(layer.path, layer.alpha):
                layer.resize(incoming[layer.path], alphas.get(layer.path))
        sync_configs(module)
    _train_as_before(module, description)
    if description.get("base_fingerprint") is not None:
        _fill_base_weights(module, weights, description["base_fingerprint"])
    # a checkpoint from before the initialisation (the learning rate finder makes them) has nothing to protect
    if description.get("done") or any(bool(t.any()) for k, t in weights.items() if ".lora_B." in k):
        mark_done(module, "restored")
    if description and isinstance(module, pl.LightningModule) and "on_save_checkpoint" not in vars(module):
        describe_on_save(module, description["injection"])
    return True


def _fit_to_adalora(module: nn.Module, weights: dict[str, Tensor], description: Mapping[str, Any]) -> None:
    """AdaLoRA keeps its ranks and masks components: a fresh module needs the same layers, no resizing."""
    if not is_adalora(module):
        inject(module, **description["injection"])
    _train_as_before(module, description)
    if description["base_fingerprint"] is not None:
        _fill_base_weights(module, weights, description["base_fingerprint"])
    mark_done(module, "restored")
    if isinstance(module, pl.LightningModule) and "on_save_checkpoint" not in vars(module):
        describe_on_save(module, description["injection"])


def _train_as_before(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Let train besides the adapters what trained when the checkpoint was written, whatever is frozen in ``module``."""
    if "trains" in description:
        trains = set(description["trains"])
        for name, p in module.named_parameters():
            if "lora_" not in name and p.is_floating_point():
                p.requires_grad_(_plain(name) in trains)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def base_fingerprint(module: nn.Module) -> str:
    """SHA-256 over a sample of every frozen parameter, rounded to bfloat16: the same in fp32 and bf16 runs."""
    digest = hashlib.sha256()
    adapters = {id(p) for x in find_adapters(module).values() for n, p in x.module.named_parameters() if "lora_" in n}
    for name, p in sorted(module.named_parameters()):
        if p.requires_grad or id(p) in adapters:
            continue
        flat = p.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(name.replace(".base_layer", "").encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _fill_base_weights(module: nn.Module, weights: dict[str, Tensor], fingerprint: str) -> None:
    own = module.state_dict()
    frozen = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    if base_fingerprint(module) != fingerprint:
        raise InputError(
            f"this adapter-only checkpoint was trained on other base weights than those {type(module).__name__} has; "
            "build the module with the same pre-trained weights"
        )
    weights.update({k: v for k, v in own.items() if k in frozen and k not in weights})
