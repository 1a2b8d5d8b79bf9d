"""bitsandbytes layers: the attributes PEFT reads, and protection from being repacked by an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def announce_quantisation(holder: Any) -> None:
    """Set what transformers sets on a quantised model; without it PEFT takes packed weights for plain ones."""
    bnb = sys.modules.get("bitsandbytes")
    if bnb is not None:
        modules = list(holder.modules())
        holder.is_loaded_in_4bit = any(isinstance(m, bnb.nn.Linear4bit) for m in modules)
        holder.is_loaded_in_8bit = any(isinstance(m, bnb.nn.Linear8bitLt) for m in modules)


@contextmanager
def kept_trainable(module: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers from repacking their weights for inference on CPUs with AVX512-BF16, for the body.

    bitsandbytes (0.50) does that in the first forward pass in eval mode, and the layer cannot be trained through
    afterwards.
    """
    flag = "support_avx512bf16_for_cpu"
    switched = [m for m in module.modules() if getattr(m, flag, False)]
    try:
        for m in switched:
            setattr(m, flag, False)
        yield
    finally:
        for m in switched:
            setattr(m, flag, True)
