"""The masks of ``mask_fn``: which tokens of a minibatch count."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eva_lightning.batch_forward import MaskFn
from eva_lightning.errors import InputTypeError
from eva_lightning.layer_inputs import FITTED
from eva_lightning.output import warn


class TokenMasks:
    """Takes a mask for every minibatch and warns once if one fits the inputs of no layer: then every token counts.

    Args:
        mask_fn: ``mask_fn(batch)``: True for the tokens that count; ``None``: all do.
    """

    def __init__(self, mask_fn: MaskFn | None) -> None:
        self._mask_fn = mask_fn
        self._mask: Tensor | None = None
        self._said = False

    def begin(self, batch: Any) -> Tensor | None:
        """The mask of a minibatch.

        Raises:
            InputTypeError: ``mask_fn`` returned something else than a tensor or ``None``.
        """
        mask = None if self._mask_fn is None else self._mask_fn(batch)
        if mask is not None and not isinstance(mask, Tensor):
            raise InputTypeError(f"mask_fn must return a bool tensor or None, got {type(mask).__name__}")
        self._mask = None if mask is None else mask.detach()  # an alias: the user's own stays as it is
        return self._mask

    def end(self) -> None:
        """Warn if the mask of the minibatch just run fits no layer."""
        if self._mask is None or self._said or hasattr(self._mask, FITTED):
            return
        self._said = True
        warn(
            f"EVA: mask_fn gave a mask of shape {tuple(self._mask.shape)}, which is that of no adapted layer's tokens, "
            "so that every token counts; return one bool per token, shape (batch, tokens) as the layers see them"
        )
