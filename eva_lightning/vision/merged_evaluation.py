"""Testing a fine-tuned model as its user will run it: adapters added to the weights, everything in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eva_lightning.adapters import merge_and_unload
from eva_lightning.adapters.layer_copy import remember_structure


@contextmanager
def merged_in_fp32(module: nn.Module) -> Iterator[None]:
    """For the body, `module` has no adapters: they are added to their base weights, and all is fp32.

    Afterwards it is bit for bit what it was, with its adapters, also if the body raises. Merging rounds to fp32 only,
    also where base weights are bf16. The weights of adapted layers, and those that are not fp32, exist twice meanwhile.

    Run the body under a Trainer of precision ``"32-true"``: another would round again.

    Raises:
        InputError: See :func:`eva_lightning.adapters.merge_and_unload`.
    """
    values = [*module.parameters(), *module.buffers()]
    data = [(value, value.data) for value in values]
    restore = remember_structure(module)
    try:
        for value in values:
            if value.is_floating_point():
                value.data = value.data.to(torch.float32)
        merge_and_unload(module)
        yield
    finally:
        restore()
        for value, before in data:
            value.data = before
