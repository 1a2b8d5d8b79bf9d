"""Methods without adapters: training everything, from pre-trained or new weights, or the output layer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch

from eva_lightning.errors import InputError
from eva_lightning.methods.apply import AdapterOptions, Where
from eva_lightning.side_effects import isolated_rng

#: Layer-wise learning-rate decay of full fine-tuning (EVA paper, section D.2).
FFT_LAYER_DECAY = 0.75


def linear(module: Any, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """Train the head alone, of modules that know how (``train_only_head``)."""
    module.train_only_head()
    return []


def fft(module: Any, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """Train everything, with layer-wise learning-rate decay where the module has it."""
    if hasattr(module, "layer_decay"):
        module.layer_decay = FFT_LAYER_DECAY
    return []


def scratch(module: L.LightningModule, options: AdapterOptions, where: Where) -> list[L.Callback]:
    """Train everything from new weights: what pre-training is worth.

    Raises:
        InputError: A layer has parameters, but no way to draw new ones; names it.
    """
    own = getattr(module, "reset_parameters", None)
    resets = [own] if callable(own) else list(_resets(module))
    with isolated_rng():
        torch.manual_seed(options.seed)
        for reset in resets:
            reset()
    return []


def _resets(module: L.LightningModule) -> Iterator[Callable[[], object]]:
    for name, layer in module.named_modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            yield reset
        elif next(layer.parameters(recurse=False), None) is not None:
            raise InputError(
                f"scratch cannot draw new weights for {name or type(module).__name__!r}: {type(layer).__name__} "
                "has parameters but no reset_parameters()"
            )
