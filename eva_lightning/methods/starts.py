"""Every initialisation from data: what it asks of the training data, and what it makes of it. One entry each.

How their layers differ is in :data:`eva_lightning.adapters.base_weight_init.INITIALISATIONS`, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from eva_lightning.adapters import AdapterLayer
from eva_lightning.adapters.base_weight_init import corda, lora_ga
from eva_lightning.methods.training_statistics import Statistic

Means = Mapping[Statistic, Tensor]
"""What :mod:`eva_lightning.methods.training_statistics` found for a layer, averaged over all processes."""


@dataclass(frozen=True)
class Given:
    """What a start may know besides the statistics.

    Attributes:
        seed: Of its random parts.
        training_samples: Size of the whole training set, for kinds that need it, else 0.
    """

    seed: int = 0
    training_samples: int = 0


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
        needs_training_size: ``given.training_samples`` is there.
        knowledge: Reads the user's knowledge data (``AdapterOptions.knowledge``), where there are any, instead.
        injection: Further arguments for :func:`eva_lightning.adapters.inject`: what the method's source sets.
    """

    needs: tuple[Statistic, ...]
    batches: int
    make: Callable[[AdapterLayer, Means, Given], tuple[Tensor, Tensor | None]]
    ranks: Callable[[Mapping[str, AdapterLayer], Mapping[str, Means], Given], Mapping[str, int]] | None = None
    needs_training_size: bool = False
    knowledge: bool = False
    injection: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    # CorDA's paper takes 256 samples, PEFT's example of LoRA-GA 128; the VTAB protocol has 64 images in a minibatch
    "corda": Kind(("scaled_inputs",), 4, lambda layer, means, _: corda(layer, means["scaled_inputs"])),
    "corda-kpm": Kind(
        ("scaled_inputs",), 4, lambda layer, means, _: corda(layer, means["scaled_inputs"], least=True), knowledge=True
    ),
    "lora-ga": Kind(("gradient",), 2, lambda layer, means, _: lora_ga(layer, means["gradient"])),
}
