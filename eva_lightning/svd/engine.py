"""What a streaming SVD engine returns, and what all engines share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eva_lightning.errors import InputError, check_number
from eva_lightning.svd.eigensolver import canonical_sign
from eva_lightning.svd.inputs import flatten_tokens, full_precision, wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

EPS = torch.finfo(torch.float32).eps


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

    @classmethod
    def of(cls, eigenvalues: Tensor, rows: Tensor, total: float, mean: Tensor, n: int) -> SVDResult:
        """The result from eigenpairs of the covariance.

        Args:
            eigenvalues: Shape ``(k,)``, fp64.
            rows: Orthonormal eigenvectors, shape ``(k, dim)``, fp32; arbitrary where `total` is 0.
            total: Total variance.
            mean: Mean of the tokens, shape ``(dim,)``.
            n: Tokens.
        """
        ratio = (eigenvalues / total).clamp_max(1.0) if total > 0 else torch.zeros_like(eigenvalues)
        return cls(
            components=canonical_sign(rows).contiguous(),
            singular_values=eigenvalues.sqrt().float(),
            explained_variance_ratio=ratio.float(),
            mean=mean.float(),
            n_samples=n,
            total_variance=total,
        )

    def to(self, device: torch.device | str) -> SVDResult:
        """The same result with its tensors on `device`."""
        return replace(
            self,
            components=self.components.to(device),
            singular_values=self.singular_values.to(device),
            explained_variance_ratio=self.explained_variance_ratio.to(device),
            mean=self.mean.to(device),
        )


class StreamingSVD(ABC):
    """A truncated SVD of mean-centred tokens that arrive batch after batch.

    Args:
        dim: Width of the inputs.
        k: Components wanted, 1 <= k <= dim.
        device: Where the state lives; None: where the first batch is.

    Raises:
        InputError: k outside [1, dim].
    """

    def __init__(self, dim: int, k: int, device: torch.device | str | None = None) -> None:
        check_number("k", k, at_least=1, at_most=dim, whole=True)
        self.dim = dim
        self.k = k
        self._device = None if device is None else torch.device(device)
        self._result: SVDResult | None = None

    @classmethod
    @abstractmethod
    def estimate_bytes(cls, dim: int, k: int) -> int:
        """Bytes of the state of one engine, before it is allocated."""

    @classmethod
    @abstractmethod
    def message_bytes(cls, dim: int, k: int) -> int:
        """Bytes every rank contributes when ranks are united."""

    @classmethod
    @abstractmethod
    def flops_per_token(cls, dim: int, k: int) -> float:
        """Of an update with many tokens, to first order."""

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """Tokens seen, masked ones left out."""

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._device or torch.device("cpu")

    @property
    def state_bytes(self) -> int:
        """Bytes the engine holds once it has seen tokens (known before anything is allocated)."""
        return self.estimate_bytes(self.dim, self.k)

    @full_precision
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of one batch.

        Args:
            x: Tokens, shape ``(..., dim)``, any floating dtype and strides.
            mask: True where a token counts, shape ``x.shape[:-1]``.

        Raises:
            FloatingPointError: NaN or Inf among the tokens that count. The engine is left as it was. On a GPU
                :meth:`verify` raises it, later.
            InputTypeError: `x` is not floating point, or `mask` is.
            InputError: Shapes that do not fit. The engine is left as it was.
        """
        tokens = flatten_tokens(x, mask, self.dim)
        if tokens.shape[0] == 0:
            return
        if self._device is None:
            self._device = tokens.device
        self._take_in(tokens.to(self._device))
        self._result = None

    def verify(self) -> None:  # noqa: B027  # nothing to do where updates wait for the GPU anyway
        """Raise what a GPU has found out about the tokens of earlier updates: waiting for it in each would stall it.

        Raises:
            FloatingPointError: Non-finite values among them; the engine is of no use any more.
        """

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Add everything `other` has seen, in place; `other` is left as it is.

        Raises:
            InputError: The two engines differ in `dim` or `k`.
        """

    @abstractmethod
    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Self:
        """Make every rank hold the union of what all ranks have seen; collective, in place.

        Messages are :meth:`message_bytes` long, never activations, and the state is identical on all ranks. Call it
        once per stream, or on a :meth:`clone`: a second call would count the union once per rank.
        """

    @full_precision
    def clone(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    @full_precision
    def result(self) -> SVDResult:
        """The top k components of everything seen so far; leaves what the engine has seen as it is.

        Raises:
            RuntimeError: No token seen yet.
        """
        if self._result is None:
            self._require_tokens()
            self._result = self._decompose()
        return self._result

    @full_precision
    def captured(self, components: Tensor) -> float:
        """Variance captured by orthonormal rows `components`, shape ``(m, dim)``, relative to the best k directions.

        ``tr(V C V^T) / sum_{j<=k} lambda_j(C)``: 1 when `components` are as good as the current optimum, and 1 when
        nothing varies.

        Raises:
            RuntimeError: No token seen yet.
        """
        singular_values = self.result().singular_values
        optimum = float(singular_values.to(wide_dtype(singular_values.device)).square().sum())
        return 1.0 if optimum == 0 else self._variance_along(components) / optimum

    @abstractmethod
    def _take_in(self, tokens: Tensor) -> None:
        """Add `tokens`, shape ``(n, dim)`` with n >= 1, on the engine's device."""

    @abstractmethod
    def _decompose(self) -> SVDResult:
        """The top k components; there are tokens."""

    @abstractmethod
    def _variance_along(self, components: Tensor) -> float:
        """``tr(V C V^T)`` of orthonormal rows V, shape ``(m, dim)``; there are tokens."""

    def _require_tokens(self) -> None:
        if not self.n_samples:
            raise RuntimeError("The SVD has seen no tokens yet: call update() first.")

    def _require_same_size(self, other: StreamingSVD) -> None:
        if (other.dim, other.k) != (self.dim, self.k):
            mine, theirs = f"({self.dim}, {self.k})", f"({other.dim}, {other.k})"
            raise InputError(f"only engines of equal (dim, k) can be merged, got {mine} and {theirs}")


def without_rounding(total_variance: float, mean: Tensor, n: int) -> float:
    """The total variance, or 0 where it is no more than the fp32 rounding of the mean: such inputs are constant."""
    return total_variance if total_variance > EPS**2 * float(mean.square().sum()) * n else 0.0
