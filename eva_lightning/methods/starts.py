"""Every initialisation from data: what it asks of the training data, and what it makes of it. One entry each.

How their layers differ is in :data:`eva_lightning.adapters.base_weight_init.INITIALISATIONS`, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eva_lightning.adapters import AdapterLayer
from eva_lightning.adapters.base_weight_init import corda, lora_ga_peft
from eva_lightning.methods.gradient_eva import gradient_eva, gradient_eva_ranks
from eva_lightning.methods.gradient_starts import gora, gora_ranks, lora_da, lora_ga, lora_one
from eva_lightning.methods.start_inputs import Given, Means
from eva_lightning.methods.training_statistics import Statistic

__all__ = ["KINDS", "Given", "Kind", "Means"]


@dataclass(frozen=True)
class Kind:
    """An initialisation from data.

    Attributes:
        needs: Statistics of every layer.
        batches: Minibatches to read by default.
        make: ``make(layer, means, given)``: A, shape ``(rank, in_features)``, and B, ``(out_features, rank)``, or None
            for B = 0. The global generators are those of ``given.seed`` when it is called.
        ranks: ``ranks(layers, means, given)``: a rank of at least 1 for every one of these layers; None keeps them. A
            layer that gets another rank keeps its scaling.
        dtype: Of the statistics; float32 on devices without float64.
        needs_training_size: ``given.training_samples`` is there.
        knowledge: Reads the user's knowledge data (``AdapterOptions.knowledge``), where there are any, instead.
        injection: Further arguments for :func:`eva_lightning.adapters.inject`: what the method's source sets.
    """

    needs: tuple[Statistic, ...]
    batches: int
    make: Callable[[AdapterLayer, Means, Given], tuple[Tensor, Tensor | None]]
    ranks: Callable[[Mapping[str, AdapterLayer], Mapping[str, Means], Given], Mapping[str, int]] | None = None
    dtype: torch.dtype = torch.float32
    needs_training_size: bool = False
    knowledge: bool = False
    injection: Mapping[str, Any] = field(default_factory=dict)


_RSLORA = {"use_rslora": True}

KINDS: dict[str, Kind] = {
    # numbers of minibatches are for the VTAB protocol's 64 images in each. CorDA's paper takes 256 samples, PEFT's
    # example of LoRA-GA 128, LoRA-DA's authors 256, LoRA-One's 8 to 64, GoRA's 32 steps of 32
    "corda": Kind(("scaled_inputs",), 4, lambda layer, means, _: corda(layer, means["scaled_inputs"])),
    "corda-kpm": Kind(
        ("scaled_inputs",), 4, lambda layer, means, _: corda(layer, means["scaled_inputs"], least=True), knowledge=True
    ),
    "lora-ga": Kind(("gradient",), 2, lora_ga, injection=_RSLORA),
    "lora-ga-peft": Kind(("gradient",), 2, lambda layer, means, _: lora_ga_peft(layer, means["gradient"])),
    "lora-da": Kind(
        ("gradient", "inputs", "output_gradients"),
        4,
        lora_da,
        dtype=torch.float64,
        needs_training_size=True,
        injection=_RSLORA,
    ),  # float32 is too coarse for the inverse of second moments that are nearly singular
    "lora-one": Kind(("gradient",), 1, lora_one, injection=_RSLORA),
    "gora": Kind(("gradient",), 16, gora, ranks=gora_ranks, injection=_RSLORA),
    # an epoch of the VTAB protocol's; alpha / r as EVA has
    "eva-gradient": Kind(("gradient", "gradient_moment"), 16, gradient_eva, ranks=gradient_eva_ranks),
}
