"""Which tokens of a minibatch are decomposed: all would cost as much as the forward pass itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eva_lightning.streaming_options import TokensPerSample

_AUTO_PER_SAMPLE = 32
_AUTO_PER_BATCH = 512
_WIDE = 512


def automatic(tokens: int, samples: int, width: int) -> int:
    """Tokens to use of each of `samples` samples of `tokens` tokens for ``tokens_per_sample="auto"``.

    32 of a sample, and at least 512 of a minibatch, in models wider than that two per dimension: there more is needed,
    and the forward pass takes long enough to hide it. All where that would leave out less than half. Tokens of one
    image or text resemble each other, so more samples help more than more tokens of each (measured in
    ``docs/engine.md``).

    Args:
        tokens: tokens of a sample.
        samples: samples of a minibatch.
        width: median width of the layers' inputs.
    """
    per_batch = max(_AUTO_PER_BATCH, 2 * width if width > _WIDE else 0)
    wanted = max(_AUTO_PER_SAMPLE, math.ceil(per_batch / max(1, samples)))
    return tokens if tokens < 2 * wanted else wanted


@dataclass
class TokenChoice:
    """The same tokens for all layers of a minibatch, other ones in every minibatch.

    Attributes:
        per_sample: how many.
        seed: seeds the order in which they are used.
        width: median width of the layers' inputs.
    """

    per_sample: TokensPerSample = "auto"
    seed: int = 0
    width: int = 0
    _n_batches: int = 0
    _chosen: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)

    def begin(self) -> None:
        """Start a minibatch."""
        self._n_batches += 1
        self._chosen.clear()

    def positions(self, tokens: int, samples: int, device: torch.device) -> Tensor | None:
        """Ascending indices of the tokens to use in every sample, or ``None`` for all."""
        key = (tokens, samples, device)
        if key not in self._chosen:
            n = self._count(tokens, samples)
            # going round one permutation shows every position equally often: where position embeddings dominate, as in
            # the first block of a vision transformer, fresh draws would weigh them by chance
            window = torch.arange(n * (self._n_batches - 1), n * self._n_batches) % tokens if n < tokens else None
            self._chosen[key] = None if window is None else self._order(tokens, 0)[window].sort().values.to(device)
        return self._chosen[key]

    def rows(self, counted: int, tokens: int, samples: int, device: torch.device) -> Tensor | None:
        """Ascending indices into the `counted` tokens that a mask leaves of all samples, or ``None`` for all."""
        key = ("rows", counted, tokens, samples, device)
        if key not in self._chosen:
            n = self._count(tokens, samples) * samples
            order = self._order(counted, self._n_batches)[:n] if n < counted else None
            self._chosen[key] = None if order is None else order.sort().values.to(device)
        return self._chosen[key]

    def _count(self, tokens: int, samples: int) -> int:
        if self.per_sample == "auto":
            return automatic(tokens, samples, self.width)
        return tokens if self.per_sample is None else min(self.per_sample, tokens)

    def _order(self, n: int, draw: int) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + draw))
