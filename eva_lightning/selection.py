"""Which components get a rank: those that explain most over all layers, within a budget (paper, section 3.5)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from eva_lightning.ranks import explained_variance, redistribute_ranks


class Spectrum(NamedTuple):
    """What is known of the variance of one layer's inputs.

    Attributes:
        singular_values: Of the centred tokens, shape ``(k,)``.
        total_variance: The sum of all squared singular values.
        n_samples: Tokens counted.
        width: Of the inputs.
    """

    singular_values: Tensor
    total_variance: float
    n_samples: int
    width: int


@dataclass(frozen=True)
class Selection:
    """The budget and how it is spent.

    Attributes:
        ranks: Layer -> its rank r before, which is its share of the budget.
        rho: Largest rank over r; a layer gets at most ``round(r * rho)``, and its width.
        metric: What components are compared by (:func:`eva_lightning.ranks.explained_variance`).
        fixed: Layers that keep their rank and stay out of the budget.
    """

    ranks: Mapping[str, int]
    rho: float = 1.0
    metric: str = "ratio"
    fixed: frozenset[str] = frozenset()

    def cap(self, layer: str, width: int) -> int:
        """Most components of a layer with inputs of `width`."""
        return min(round(self.ranks[layer] * self.rho), width)

    def of(self, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        """Layer -> how many of its components get a rank, for the layers that have a spectrum."""
        ranks = {layer: min(self.ranks[layer], spectrum.width) for layer, spectrum in spectra.items()}
        free = {layer: spectrum for layer, spectrum in spectra.items() if layer not in self.fixed}
        caps = {layer: self.cap(layer, spectrum.width) for layer, spectrum in free.items()}
        scores = {
            layer: explained_variance(
                spectrum.singular_values[: caps[layer]], spectrum.total_variance, spectrum.n_samples, self.metric
            )
            for layer, spectrum in free.items()
        }
        return ranks | redistribute_ranks(scores, sum(self.ranks[layer] for layer in free), caps)

    def __str__(self) -> str:
        mean = statistics.mean(self.ranks.values()) if self.ranks else 0
        return f"r = {mean:g}, rho = {self.rho:g}, metric {self.metric}"
