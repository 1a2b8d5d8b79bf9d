"""Which tokens of a minibatch are decomposed: all would cost as much as the forward pass itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eva_lightning.streaming_options import TokensPerSample
from eva_lightning.svd import token_noise

_AUTO_PER_SAMPLE = 32
_AUTO_PER_BATCH = 512
_PER_NOISE = 200
_SHARE_OF_PRODUCT = 0.3


def automatic(tokens: int, samples: int) -> int:
    """Tokens to use of each of `samples` samples of `tokens` tokens for ``tokens_per_sample="auto"``, in any layer.

    32 of a sample, and of a minibatch at least 512. All where that would leave out less than half. Tokens of one image
    or text resemble each other, so more samples help more than more tokens of each (measured in ``docs/engine.md``).

    Args:
        tokens: tokens of a sample.
        samples: samples of a minibatch.
    """
    wanted = max(_AUTO_PER_SAMPLE, math.ceil(_AUTO_PER_BATCH / max(1, samples)))
    return tokens if tokens < 2 * wanted else wanted


@dataclass(frozen=True)
class Price:
    """What a token costs a layer.

    Attributes:
        token: flops of its decomposition over those of the median layer.
        product: the same over those of the layer's own product; 0 if that is not known.
    """

    token: float = 1.0
    product: float = 0.0


@dataclass(frozen=True)
class Need:
    """How many tokens a layer is to have.

    Attributes:
        per_batch: of a minibatch, if that is more than what all have.
        share: most of the tokens there are.
    """

    per_batch: float = 0.0
    share: float = 1.0

    @classmethod
    def of(cls, tokens: Tensor, k: int, price: Price) -> Need:
        """From the tokens of a layer's first minibatch.

        The more, the more a choice of tokens costs the layer (:func:`eva_lightning.svd.token_noise`), and the fewer,
        the dearer they are. With losses of noise / n, ``n = (noise**2 / price)**(1/3)`` times a constant makes the sum
        of their squares least for what all tokens cost together. Never so many that the decomposition takes more than
        0.3 of the flops of the layer's own product.

        Args:
            tokens: shape ``(n, width)``.
            k: components wanted.
            price: of a token.
        """
        if len(tokens) < 4 * k:  # too few to tell
            return cls()
        share = _SHARE_OF_PRODUCT / price.product if price.product else 1.0
        return cls(_PER_NOISE * (token_noise(tokens, k) ** 2 / price.token) ** (1 / 3), share)

    def count(self, tokens: int, samples: int, least: int) -> int:
        """Tokens of each sample, at least `least`."""
        wanted = min(math.ceil(self.per_batch / max(1, samples)), int(self.share * tokens))
        return min(max(least, wanted), tokens)


@dataclass
class TokenChoice:
    """Which tokens of a minibatch each layer gets: other ones in every minibatch, and more where more are needed.

    Attributes:
        per_sample: how many.
        seed: seeds the order in which they are used.
    """

    per_sample: TokensPerSample = "auto"
    seed: int = 0
    _n_batches: int = 0
    _chosen: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)
    _needs: dict[str, Need] = field(default_factory=dict)
    _left_out: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Start a minibatch."""
        self._n_batches += 1
        self._chosen.clear()

    def of(self, layer: str, added: bool = False) -> LayerTokens:
        """The tokens of a layer; only those that :meth:`learn` has just added to them if `added`."""
        return LayerTokens(self, layer, self._needs.get(layer, Need()), added)

    def is_open(self, layer: str) -> bool:
        """Whether :meth:`learn` should be asked: not where no token is left out."""
        return self.per_sample == "auto" and layer in self._left_out and layer not in self._needs

    def leave_out(self, layer: str) -> None:
        """Note that not all tokens of a layer are used."""
        self._left_out.add(layer)

    def learn(self, layer: str, tokens: Tensor, k: int, price: Price) -> None:
        """Find out how many tokens a layer needs, see :meth:`Need.of`; holds from now on."""
        self._needs[layer] = Need.of(tokens, k, price)

    def same(self, layer: str, other: str) -> None:
        """Give `layer` as many tokens as `other` has."""
        if other in self._needs:
            self._needs[layer] = self._needs[other]

    def least(self, tokens: int, samples: int) -> int:
        """Tokens of a sample that every layer gets."""
        if self.per_sample == "auto":
            return automatic(tokens, samples)
        return tokens if self.per_sample is None else min(self.per_sample, tokens)

    def positions(self, tokens: int, first: int, n: int, device: torch.device) -> Tensor | None:
        """`n` ascending positions in every sample, in round `first` of the minibatch on; ``None`` for all."""
        if n >= tokens:
            return None
        key = (tokens, first, n, device)
        if key not in self._chosen:
            # going round one permutation shows every position equally often: where position embeddings dominate, as in
            # the first block of a vision transformer, fresh draws would weigh them by chance
            self._chosen[key] = self._order(tokens, 0)[torch.arange(first, first + n) % tokens].sort().values.to(device)
        return self._chosen[key]

    def rows(self, counted: int, first: int, n: int, device: torch.device) -> Tensor | None:
        """Ascending indices of `n` of `counted` tokens, drawn anew in every minibatch; ``None`` for all."""
        if first == 0 and n >= counted:
            return None
        key = ("rows", counted, first, n, device)
        if key not in self._chosen:
            self._chosen[key] = self._order(counted, self._n_batches)[first : first + n].sort().values.to(device)
        return self._chosen[key]

    @property
    def before(self) -> int:
        """Minibatches before this one."""
        return self._n_batches - 1

    def _order(self, n: int, draw: int) -> Tensor:
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed + draw))


@dataclass(frozen=True)
class LayerTokens:
    """The choice for one layer in one minibatch.

    Attributes:
        choice: that of all layers.
        layer: its name.
        need: the layer's own.
        added: only the tokens beyond those of a layer without needs.
    """

    choice: TokenChoice
    layer: str
    need: Need = Need()
    added: bool = False

    def positions(self, tokens: int, samples: int, device: torch.device) -> Tensor | None:
        """Ascending indices of the tokens to use in every sample, or ``None`` for all."""
        least, n = self._counts(tokens, samples)
        before = self.choice.before
        first, n = (least * (before + 1), n - least) if self.added else (n * before, n)
        return self._noted(self.choice.positions(tokens, first, n, device))

    def rows(self, counted: int, tokens: int, samples: int, device: torch.device) -> Tensor | None:
        """Ascending indices into the `counted` tokens that a mask leaves of all samples, or ``None`` for all."""
        least, n = (count * samples for count in self._counts(tokens, samples))
        first, n = (least, n - least) if self.added else (0, n)
        return self._noted(self.choice.rows(counted, first, n, device))

    def _noted(self, index: Tensor | None) -> Tensor | None:
        if index is not None:
            self.choice.leave_out(self.layer)
        return index

    def _counts(self, tokens: int, samples: int) -> tuple[int, int]:
        least = self.choice.least(tokens, samples)
        return least, self.need.count(tokens, samples, least)
