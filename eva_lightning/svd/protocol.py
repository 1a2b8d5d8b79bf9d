"""What a streaming SVD engine returns, and what every engine can do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class SVDResult:
    """Truncated SVD of the mean-centred matrix ``Xc`` of all tokens seen.

    Attributes:
        components: Top right-singular vectors, shape ``(k, dim)``, fp32, orthonormal rows. The entry of largest
            magnitude of each row is positive, which makes the sign deterministic.
        singular_values: Shape ``(k,)``, fp32, descending; ``singular_values**2`` are eigenvalues of ``Xc^T Xc``.
        explained_variance_ratio: Shape ``(k,)``, eigenvalue over ``total_variance``; zeros when nothing varies.
        mean: Mean of the tokens, shape ``(dim,)``, fp32.
        n_samples: Tokens counted, masked ones left out.
        total_variance: ``tr(Xc^T Xc)``, the sum of ALL squared singular values, not only of the k kept ones.
    """

    components: Tensor
    singular_values: Tensor
    explained_variance_ratio: Tensor
    mean: Tensor
    n_samples: int
    total_variance: float

    def to(self, device: torch.device | str) -> SVDResult:
        """The same result with its tensors on `device`."""
        return replace(
            self,
            components=self.components.to(device),
            singular_values=self.singular_values.to(device),
            explained_variance_ratio=self.explained_variance_ratio.to(device),
            mean=self.mean.to(device),
        )


class StreamingSVD(Protocol):
    """A truncated SVD of mean-centred tokens that arrive batch after batch."""

    dim: int
    k: int

    @property
    def n_samples(self) -> int:
        """Tokens seen, masked ones left out."""

    @property
    def state_bytes(self) -> int:
        """Bytes the engine holds once it has seen tokens (known before anything is allocated)."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            x: Tokens, shape ``(..., dim)``, any floating dtype and strides.
            mask: True where a token counts, shape ``x.shape[:-1]``.

        Raises:
            FloatingPointError: Non-finite values among the tokens that count. The engine is left as it was. On a GPU
                :meth:`verify` raises it, later.
            InputError: Shapes that do not fit. The engine is left as it was.
        """

    def verify(self) -> None:
        """Raise what a GPU has found out about the tokens of earlier updates: waiting for it in each would stall it.

        Raises:
            FloatingPointError: Non-finite values among them; the engine is of no use any more.
        """

    def merge(self, other: Self) -> Self:
        """Add everything `other` has seen, in place. Associative and order-free up to rounding."""

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Make every rank hold the union of what all ranks have seen; collective, in place.

        Call it once per stream, or on a :meth:`clone`: a second call would count the union once per rank.
        """

    def clone(self) -> Self:
        """An independent copy."""

    def result(self) -> SVDResult:
        """The decomposition of everything seen so far; leaves the engine's state as it is.

        Raises:
            RuntimeError: No token seen yet.
        """

    def captured(self, components: Tensor) -> float:
        """Variance captured by orthonormal rows `components`, relative to the best k directions.

        ``tr(V C V^T) / sum_{j<=k} lambda_j(C)``: 1 when `components` are as good as the current optimum, and 1 when
        nothing varies.
        """
