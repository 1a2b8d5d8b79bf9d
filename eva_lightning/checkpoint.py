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
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from eva_lightning.adapters import find_adapters, inject
from eva_lightning.adapters.adalora import is_adalora
from eva_lightning.adapters.base_weight_init import resize
from eva_lightning.adapters.injection import INJECTION, Injection
from eva_lightning.adapters.registry import add_layers, remove, restored_on_failure, sync_configs, target_of
from eva_lightning.adapters.weight_reads import is_read_elsewhere, mark_read_elsewhere
from eva_lightning.done import done, mark_done, unmark
from eva_lightning.errors import InputError
from eva_lightning.namespaces import is_lightning_module, namespace_of

KEY = "eva_lightning"
"""Where a checkpoint keeps the description of its adapters."""

NOTICE = (
    "eva_lightning: this checkpoint has LoRA adapters, which a new module lacks. Import eva_lightning before "
    "MyModule.load_from_checkpoint, or put EVAInitCallback into the Trainer; for a process that cannot import "
    "eva_lightning, convert the file with python -m eva_lightning.plain_checkpoint"
)
"""A name among the weights. Without us the module is built without adapters, and the error of its strict loading lists
the names that it does not know: this one first."""

_A_KEY = re.compile(r"^(?P<path>.+)\.lora_A\.(?P<adapter>[^.]+)\.weight$")

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)


def describe(
    module: nn.Module, injection: Mapping[str, Any], adapter_only: bool, built_with: Mapping[str, int]
) -> dict[str, Any]:
    """What a fresh module needs to know to fit this module's weights: primitives only (``weights_only`` loading).

    Args:
        module: with its adapters.
        injection: the arguments for :func:`eva_lightning.adapters.inject`.
        adapter_only: whether the frozen weights are left out, which adds their fingerprint.
        built_with: the ranks of the adapters that a fresh module has by itself.
    """
    layers = find_adapters(module).values()
    return {
        "version": 1,
        "adapters": {layer.path: {"rank": layer.rank, "alpha": layer.alpha} for layer in layers},
        "injection": dict(injection),
        "built_with": dict(built_with),
        "trains": [_plain(n) for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n],
        "done": done(module),
        "read_elsewhere": [layer.path for layer in layers if is_read_elsewhere(layer)],
        "base_fingerprint": base_fingerprint(module) if adapter_only else None,
    }


def save_into(checkpoint: dict[str, Any], module: pl.LightningModule, description: dict[str, Any]) -> None:
    """Add the description to a checkpoint about to be written; where only we can load it, its weights say so."""
    checkpoint[KEY] = description
    weights = checkpoint["state_dict"]
    if description["base_fingerprint"] is not None:
        frozen = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        weights = checkpoint["state_dict"] = {k: v for k, v in weights.items() if k not in frozen}
    ranks = {path: entry["rank"] for path, entry in description["adapters"].items()}
    # what several processes write together has to be on all of them alike, and only Lightning's strategies read it
    shared = any(hasattr(value, "full_tensor") for value in weights.values())
    if ranks != description["built_with"] and weights and not shared:
        weights[NOTICE] = torch.empty(0)


def _pass_over_notice(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(prefix + NOTICE, None)


class _DescribedSaving:
    """``on_save_checkpoint`` of a module with adapters: writes their description into every checkpoint of it.

    It lives on the module, not in the callback, because Lightning calls no callback for ``save_weights_only``, and
    another Trainer may save the module. A class, so that the module can still be pickled and copied.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        injection: Mapping[str, Any],
        adapter_only: bool,
        built_with: Mapping[str, int],
    ) -> None:
        self.module, self.injection, self.adapter_only = module, dict(injection), adapter_only
        self.built_with = dict(built_with)
        self.stop_passing_over = module.register_load_state_dict_pre_hook(_pass_over_notice)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if find_adapters(self.module) or is_adalora(self.module):
            description = describe(self.module, self.injection, self.adapter_only, self.built_with)
            save_into(checkpoint, self.module, description)
        type(self.module).on_save_checkpoint(self.module, checkpoint)


def describe_on_save(
    module: pl.LightningModule,
    injection: Mapping[str, Any],
    adapter_only: bool = False,
    built_with: Mapping[str, int] | None = None,
) -> None:
    """Have every checkpoint of ``module`` say what its adapters are, so that a fresh module can load it.

    Args:
        module: with adapters, now or by the time it is saved.
        injection: the arguments for :func:`eva_lightning.adapters.inject` that a fresh module needs.
        adapter_only: leave frozen weights out of the checkpoints.
        built_with: the adapters that a fresh module brings itself, with their ranks; default: those it has when this is
            first called.
    """
    before = vars(module).get("on_save_checkpoint")
    if built_with is None:
        built_with = before.built_with if isinstance(before, _DescribedSaving) else _ranks(module)
    stop_describing(module)
    vars(module)["on_save_checkpoint"] = _DescribedSaving(module, injection, adapter_only, built_with)


def stop_describing(module: nn.Module) -> None:
    """Undo :func:`describe_on_save`."""
    described = vars(module).pop("on_save_checkpoint", None)
    if isinstance(described, _DescribedSaving):
        described.stop_passing_over.remove()


def _ranks(module: nn.Module) -> dict[str, int]:
    return {layer.path: layer.rank for layer in find_adapters(module).values()}


def instantiate(cls: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """What checkpoints of version 0.1.0 name as their instantiator; Lightning before 2.6.6 calls it."""
    return cls(**kwargs)


def instantiate_cli(cls: Any, kwargs: dict[str, Any]) -> Any:
    """As :func:`instantiate`, for modules that LightningCLI built."""
    from lightning.pytorch.cli import instantiate_module

    return instantiate_module(cls, kwargs)


def load_from_checkpoint(cls: type[ModuleT], checkpoint_path: str | os.PathLike[str], **kwargs: Any) -> ModuleT:
    """``cls.load_from_checkpoint`` for any checkpoint with adapters, also those that do not describe them.

    Those that an EVAInitCallback wrote describe them: ``cls.load_from_checkpoint(path)`` loads them just as well once
    eva_lightning is imported.
    """
    with _prepared_for_loading(cls, described=False):
        return cls.load_from_checkpoint(os.fspath(checkpoint_path), **kwargs)


def load_with(load: Callable[..., ModuleT], cls: type[ModuleT], *args: Any, **kwargs: Any) -> ModuleT:
    """Lightning's ``cls.load_from_checkpoint``, with modules fitted to checkpoints that describe adapters.

    Args:
        load: Lightning's own.
        cls: the module's class, or one above it.
        args, kwargs: for `load`.
    """
    with _prepared_for_loading(cls, described=True):
        try:
            return load(*args, **kwargs)
        except ValueError as error:
            # Lightning >= 2.6.6 refuses the instantiators that checkpoints of version 0.1.0 name
            refused = [name for name in (instantiate, instantiate_cli) if f"'{__name__}.{name.__name__}'" in str(error)]
            if not refused:
                raise
        cli = f"{namespace_of(cls)}.cli.instantiate_module"
        kwargs["_instantiator"] = cli if refused == [instantiate_cli] else None
        file = args[0] if args else kwargs["checkpoint_path"]
        if hasattr(file, "seek"):
            file.seek(0)
        return load(*args, **kwargs)


@contextmanager
def _prepared_for_loading(cls: type, described: bool) -> Iterator[None]:
    """Have modules of a class that are built meanwhile fit themselves to the checkpoint they load."""
    stops: dict[int, Callable[[], None]] = {}
    thread = threading.get_ident()

    def on_registration(module: nn.Module, *_: Any) -> None:
        if isinstance(module, cls) and id(module) not in stops and threading.get_ident() == thread:
            stops[id(module)] = watch_loading(module, described=described)  # type: ignore[arg-type]

    handles = [
        register_module_module_registration_hook(on_registration),
        register_module_parameter_registration_hook(on_registration),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stop in stops.values():
            stop()


def watch_loading(
    module: pl.LightningModule,
    injection: Mapping[str, Any] | None = None,
    changed: Callable[[], None] | None = None,
    described: bool = False,
) -> Callable[[], None]:
    """Fit ``module`` to the next checkpoint it loads, once; returns a function that stops watching.

    Args:
        module: about to load a checkpoint, perhaps.
        injection: arguments for :func:`eva_lightning.adapters.inject`, for checkpoints that do not hold their own.
        changed: called after the module's parameters were replaced.
        described: leave checkpoints alone that do not describe adapters: Lightning loads them as ever.
    """
    if "on_load_checkpoint" in vars(module):
        return lambda: None
    original = module.on_load_checkpoint

    def stop() -> None:
        vars(module).pop("on_load_checkpoint", None)

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        stop()
        ours = KEY in checkpoint or not described
        if ours and fit_to_checkpoint(module, checkpoint, injection) and changed is not None:
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
    weights.pop(NOTICE, None)
    incoming = {m["path"]: int(t.shape[0]) for k, t in weights.items() if (m := _A_KEY.match(k))}
    description = checkpoint.get(KEY) or {}
    present = {layer.path: layer for layer in find_adapters(module).values()}
    built_with = _ranks(module)
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
    arguments = description.get("injection", injection)
    ours: Injection | None = vars(module).get(INJECTION)
    if ours is not None and ours.is_in(module) and (arguments != injection or not present.keys() >= set(targets)):
        ours.undo(module)  # put in a moment ago by other arguments than the checkpoint's, which decide
        present = {}
    if not present:
        if arguments is None:
            raise InputError(
                f"the checkpoint does not say how its adapters were made, and {type(module).__name__} has none: give "
                "it adapters of the same r and alpha first (eva_lightning.adapters.inject)"
            )
        injected = inject(module, **{**arguments, "target_modules": targets, "exclude": None})
        if ours is not None:
            vars(ours).update(vars(injected))
        present = {layer.path: layer for layer in find_adapters(module).values()}
    with restored_on_failure(module):
        add_layers(module, [path for path in targets if path not in present])
        for layer in find_adapters(module).values():
            if layer.path not in incoming:
                remove(module, layer)
            elif layer.rank != incoming[layer.path] or layer.alpha != alphas.get(layer.path, layer.alpha):
                resize(layer, incoming[layer.path], alphas.get(layer.path))
        sync_configs(module)
    read = description.get("read_elsewhere", ())
    mark_read_elsewhere(layer for layer in find_adapters(module).values() if layer.path in read)
    _train_as_before(module, description)
    if description.get("base_fingerprint") is not None:
        _fill_base_weights(module, weights, description["base_fingerprint"])
    # a checkpoint from before the initialisation (the learning rate finder makes them) has nothing to protect
    if description.get("done") or any(bool(t.any()) for k, t in weights.items() if ".lora_B." in k):
        mark_done(find_adapters(module).values(), "restored")
    else:
        unmark(find_adapters(module).values())
    if description:
        _go_on_describing(module, description, built_with)
    return True


def _fit_to_adalora(module: nn.Module, weights: dict[str, Tensor], description: Mapping[str, Any]) -> None:
    """AdaLoRA keeps its ranks and masks components: a fresh module needs the same layers, no resizing."""
    if not is_adalora(module):
        inject(module, **description["injection"])
    _train_as_before(module, description)
    if description["base_fingerprint"] is not None:
        _fill_base_weights(module, weights, description["base_fingerprint"])
    _go_on_describing(module, description, {})


def _go_on_describing(module: nn.Module, description: Mapping[str, Any], built_with: Mapping[str, int]) -> None:
    described = vars(module).get("on_save_checkpoint")
    if isinstance(described, _DescribedSaving):
        described.injection = dict(description["injection"])
    elif is_lightning_module(module) and described is None:
        describe_on_save(cast(pl.LightningModule, module), description["injection"], built_with=built_with)


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
