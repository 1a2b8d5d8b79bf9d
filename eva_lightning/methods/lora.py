"""LoRA and its relatives whose adapters are there before ``fit``: DoRA, rsLoRA, LoRA+, PiSSA, MiLoRA, AILoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L

from eva_lightning.adapters import choose_layers, inject
from eva_lightning.adapters.attention_roles import queries_and_values
from eva_lightning.adapters.base_weight_init import takes_from_base
from eva_lightning.callback_base import Callback
from eva_lightning.checkpoint import describe_on_save, watch_loading
from eva_lightning.errors import InputError
from eva_lightning.methods.apply import AdapterOptions, Where


class AdapterCheckpoints(Callback):
    """Describe the adapters in checkpoints and, where that is enough, leave the frozen weights out.

    30 checkpoints of a whole ViT-g take 140 GB. A module without adapters, but with the same pre-trained weights, takes
    such a checkpoint.

    Args:
        injection: The arguments :func:`eva_lightning.adapters.inject` was called with.
        adapter_only: Leave the frozen weights out; not for methods that change them.
    """

    def __init__(self, injection: dict[str, Any], adapter_only: bool = True) -> None:
        self.injection = injection
        self.adapter_only = adapter_only
        self._stop_watching: Callable[[], None] = _nothing

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fill the frozen weights in again when a checkpoint is restored."""
        describe_on_save(pl_module, self.injection, self.adapter_only, built_with={})
        self._stop_watching = watch_loading(pl_module, self.injection)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module's own loading as it was."""
        self._stop_watching()


def _nothing() -> None:
    pass  # a lambda could not go to another process


def prepare(
    module: L.LightningModule, options: AdapterOptions, where: Where, *, use_dora: bool = False, **injection: Any
) -> list[L.Callback]:
    """Put the adapters in, `injection` being further arguments for :func:`eva_lightning.adapters.inject`."""
    # primitives only, as they travel in checkpoints
    arguments = {
        "r": options.rank,
        "alpha": options.alpha,
        "target_modules": options.target_modules,
        "head": where.head if where.head is None or isinstance(where.head, str) else list(where.head),
        "exclude": None if where.exclude is None else list(where.exclude),
        "bias": options.bias,
        "lora_dropout": options.dropout,
        **(options.dora() if use_dora else {}),
        **injection,
    }
    # a fresh module gets the same layers, whatever is frozen in it
    arguments |= {"target_modules": inject(module, **arguments).targets, "exclude": None}
    changes_base = takes_from_base(injection.get("initialisation", "lora"), injection.get("keep_function", False))
    return [AdapterCheckpoints(arguments, adapter_only=not changes_base)]


def prepare_ailora(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """AILoRA (arXiv 2510.08034): adapters on queries and values alone, PiSSA's on the former, MiLoRA's on the latter.

    Of ``options.target_modules`` those that are queries or values.

    Raises:
        InputError: The module computes them in one layer, or names them otherwise.
    """
    candidates = choose_layers(module, options.target_modules, where.exclude, where.head).targets
    chosen = queries_and_values(module, candidates, "ailora")
    return prepare(module, replace(options, target_modules=chosen), where, initialisation="ailora")


def prepare_plus(module: Any, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """LoRA, with B trained at a higher learning rate than A.

    Raises:
        InputError: The module has no ``lr_multipliers`` for its ``configure_optimizers`` to heed.
    """
    if not hasattr(module, "lr_multipliers"):
        raise InputError(
            f"lora+ trains B at another learning rate than A, and {type(module).__name__} has no lr_multipliers by "
            "which its configure_optimizers could know"
        )
    callbacks = prepare(module, options, where)
    module.lr_multipliers = partial(lora_plus_multiplier, ratio=options.lora_plus_ratio)
    return callbacks


def lora_plus_multiplier(name: str, ratio: float) -> float:
    """LoRA+ (Hayou et al., 2024): the factor on the learning rate of the parameter called `name`, `ratio` for every B.

    PEFT's ``create_loraplus_optimizer`` also gives biases the learning rate of B; the paper names only B.
    """
    return ratio if ".lora_B." in name else 1.0
