"""Testing a fine-tuned model as its user will run it: adapters added to the weights, everything in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eva_lightning.adapters import merge_and_unload
from eva_lightning.adapters.registry import lora_layers


@contextmanager
def merged_in_fp32(module: nn.Module) -> Iterator[None]:
    """For the body, `module` has no adapters: they are added to their base weights, and all is fp32.

    Afterwards it is bit for bit what it was, with its adapters, also if the body raises. Merging rounds in fp32 only,
    also where base weights are bf16. The weights of adapted layers, and those that are not fp32, exist twice meanwhile.

    Run the body under a Trainer of precision ``"32-true"``: another would round again.

    Raises:
        InputError: Merged weights are NaN or infinite.
    """
    values = [*module.parameters(), *module.buffers()]
    data = [(value, value.data) for value in values]
    children = [(parent, dict(parent._modules)) for parent in module.modules()]
    layers = lora_layers(module)
    adapted = {id(parameter) for layer in layers for parameter in layer.base.parameters()}
    try:
        for value in values:
            if value.is_floating_point():
                # merging writes in place
                value.data = value.data.to(torch.float32, copy=id(value) in adapted)
        merge_and_unload(module)
        yield
    finally:
        for parent, before in children:
            parent._modules.clear()
            parent._modules.update(before)
        for value, before_data in data:
            value.data = before_data
        for layer in layers:
            _forget_merge(layer.module)


def _forget_merge(layer: nn.Module) -> None:
    """The base weight is back: PEFT must not take the adapter off again."""
    layer.merged_adapters.clear()  # type: ignore[union-attr, operator]
    layer._caches.clear()  # type: ignore[union-attr, operator]
