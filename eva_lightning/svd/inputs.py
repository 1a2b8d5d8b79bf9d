"""From whatever a layer was called with to a matrix of tokens, and the numerical context engines run in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from eva_lightning.errors import InputError, InputTypeError

P = ParamSpec("P")
T = TypeVar("T")
_CACHED = 2**18  # values of fp32: 1 MiB


def full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` without gradients, autocast and inference mode, whatever the caller is in.

    Forward hooks run inside the trainer's autocast, which would turn the accumulation into bf16, and evaluation may
    run in inference mode, whose tensors could not be updated in place later.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            return function(*args, **kwargs)

    return wrapped


def wide_dtype(device: torch.device) -> torch.dtype:
    """fp64 for sums, means and small matrices; fp32 on Apple's GPUs, which have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def flatten_tokens(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Check one update's input and flatten it to the tokens that count.

    Args:
        x: Shape ``(..., dim)``, any floating dtype and strides.
        mask: Shape ``x.shape[:-1]``, boolean or integer, or None when every token counts.
        dim: Width the engine was built for.

    Returns:
        Shape ``(n, dim)``, at least fp32.

    Raises:
        InputTypeError: `x` is not floating point, or `mask` is.
        InputError: Shapes that do not fit.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise InputTypeError(f"the SVD needs a floating-point tensor, got {kind}")
    if x.ndim == 0 or x.shape[-1] != dim:
        raise InputError(f"the SVD expects inputs of shape (..., {dim}), got {tuple(x.shape)}")
    tokens = x.detach().reshape(-1, dim)
    if tokens.dtype not in (torch.float32, torch.float64):
        tokens = tokens.float()
    if mask is None:
        return tokens
    if mask.is_floating_point():
        raise InputTypeError(f"a token mask must be boolean (True: the token counts), got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise InputError(f"a token mask must have shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    # Dropping masked tokens rather than zeroing them: what padding holds, NaN included, never matters.
    return tokens[mask.to(device=x.device, dtype=torch.bool).reshape(-1)]


def token_mean(tokens: Tensor) -> Tensor:
    """Mean over the first axis that returns a repeated token exactly, so that constant inputs centre to zero.

    Args:
        tokens: Shape ``(n, dim)``, n >= 1.

    Returns:
        Shape ``(dim,)``, dtype of `tokens`.
    """
    first = tokens[0]
    return first + (tokens - first).mean(dim=0)


def centred_pieces(tokens: Tensor, mean: Tensor) -> Iterator[Tensor]:
    """Tokens minus their mean, on a CPU in pieces that stay in its cache while they are worked on.

    Args:
        tokens: Shape ``(n, dim)``, at least fp32; what large means have in common goes before the rounding to fp32.
        mean: Shape ``(dim,)``.

    Yields:
        Shape ``(<= n, dim)``, fp32.
    """
    rows = len(tokens) if tokens.device.type != "cpu" else max(1, _CACHED // max(1, tokens.shape[1]))
    mean = mean.to(tokens.dtype)
    for piece in tokens.split(max(1, rows)):
        yield (piece - mean).float()


def squared_norm(tokens: Tensor) -> Tensor:
    """Sum of squares of all entries: rows in fp32, their sum in fp64. One fp32 sum over a batch would lose 1e-4.

    Args:
        tokens: Shape ``(n, dim)``.

    Returns:
        A scalar, fp64; NaN or infinite if any entry is, or is beyond 1e19.
    """
    return torch.linalg.vector_norm(tokens.float(), dim=1).to(wide_dtype(tokens.device)).square().sum()


def require_finite(value: float) -> None:
    """Raise when a reduction over a batch shows NaN or Inf in it.

    Raises:
        FloatingPointError: `value` is not finite.
    """
    if not -float("inf") < value < float("inf"):
        raise FloatingPointError(
            "The SVD met NaN or Inf (or values beyond 1e19) among the inputs; this batch was not counted."
        )
