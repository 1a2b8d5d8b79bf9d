"""What an initialisation from data is made of: statistics of a layer, and what else it may know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from eva_lightning.methods.training_statistics import Statistic

Means = Mapping[Statistic, Tensor]
"""What :mod:`eva_lightning.methods.training_statistics` found for a layer, averaged over all processes."""


@dataclass(frozen=True)
class Given:
    """What a start may know besides the statistics.

    Attributes:
        seed: Of its random parts.
        training_samples: Size of the whole training set, for kinds that need it, else 0.
        minibatches_per_step: Whose gradients an optimizer step averages: accumulated ones times processes.
        rho: Largest rank over mean rank.
    """

    seed: int = 0
    training_samples: int = 0
    minibatches_per_step: int = 1
    rho: float = 1.0
