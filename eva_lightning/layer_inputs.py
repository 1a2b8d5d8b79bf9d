"""How the input of a layer becomes tokens, the rows of the matrix EVA decomposes: one class per kind of layer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva_lightning.errors import InputError, InputTypeError
from eva_lightning.token_subsampling import LayerTokens

Tokens = tuple[Tensor, "Tensor | None"]

FITTED = "_eva_lightning_fitted"
"""Set on a mask that some layer's tokens had the shape of."""

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LayerInputs:
    """The inputs of a layer that multiplies the last dimension: nn.Linear, Conv1D, quantised linear layers.

    Attributes:
        module: the module whose calls show the inputs.
        width: length of a token.
        kind: layers share a decomposition only if this is equal too, not just the tensor.
        in_one_piece: :meth:`tokens` gives a single piece.
    """

    kind: Hashable = "linear"
    in_one_piece = True

    def __init__(self, module: nn.Module, width: int | None = None) -> None:
        self.module = module
        self.width = _in_features(module) if width is None else width

    def read(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tokens:
        """The tensor the layer ``name`` works on in this call, batch first, and the mask for it."""
        return layer_input(name, args, kwargs), mask

    def tokens(self, x: Tensor, mask: Tensor | None, choice: LayerTokens) -> Iterator[Tokens]:
        """Pieces of shape (..., width), each with its mask of shape (...) or ``None``."""
        mask = fit_mask(mask, x.shape[:-1], x.device)
        if x.dim() >= 3:
            samples, tokens = len(x), math.prod(x.shape[1:-1])
            if mask is not None:
                # of the tokens that count: fixed positions might all be padding
                counted = mask.flatten().nonzero().squeeze(1)
                index = choice.rows(len(counted), tokens, samples, x.device)
                x, mask = x.flatten(0, -2)[counted if index is None else counted[index]], None
            else:
                index = choice.positions(tokens, samples, x.device)
                x = x if index is None else x.flatten(1, -2).index_select(1, index)
        elif choice.added:
            return  # all are used already
        yield x, mask


class PatchInputs(LayerInputs):
    """The inputs of a convolution: the patches its filters see, of length in_channels * prod(kernel_size).

    Patches are cut with the geometry of ``filters`` (LoRA's A, itself a convolution) from a zero-padded input.

    Attributes:
        piece: most values to unfold at once (64 MiB in fp32): a 3 x 3 convolution's patches are nine times its input.
    """

    in_one_piece = False
    piece = 2**24

    def __init__(self, module: nn.Module, filters: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(module, math.prod(filters.weight.shape[1:]))
        self.kernel, self.stride = filters.kernel_size, filters.stride
        self.padding = _padding(filters)
        self.kind = ("patches", self.kernel, self.stride, self.padding)

    def tokens(self, x: Tensor, mask: Tensor | None, choice: LayerTokens) -> Iterator[Tokens]:
        d = len(self.kernel)
        x = x.unsqueeze(0) if x.dim() == d + 1 else x
        patches = F.pad(x, self.padding)
        for axis, (kernel, stride) in enumerate(zip(self.kernel, self.stride, strict=True)):
            patches = patches.unfold(2 + axis, kernel, stride)
        patches = patches.movedim(1, 1 + d)  # a view (N, *positions, C, *kernel): nothing is copied yet
        positions = patches.shape[1 : 1 + d]
        mask = fit_mask(mask, patches.shape[: 1 + d], x.device)
        index = choice.positions(math.prod(positions), len(patches), x.device)
        count = math.prod(positions) if index is None else len(index)
        step = max(1, self.piece // max(1, count * self.width))
        where: Any = None if index is None else (slice(None), *torch.unravel_index(index, positions))
        for start in range(0, len(patches), step):
            piece = patches[start : start + step]
            kept = None if mask is None else mask[start : start + step].flatten(1)
            if where is not None:
                piece = piece[where]
                kept = kept if kept is None or index is None else kept.index_select(1, index)
            yield piece.reshape(len(piece), count, self.width), kept


class AttentionInputs(LayerInputs):
    """The inputs of ``nn.MultiheadAttention``'s packed query, key and value projection: self-attention only.

    Padding that the call itself names (``key_padding_mask``) does not count.
    """

    kind: Hashable = "attention"

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__(module, module.embed_dim)

    def read(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tokens:
        call = _attention_call(args, kwargs)
        query = call["query"]
        if call["key"] is not query or call["value"] is not query:
            raise InputError(
                f"layer {name!r} is used for cross-attention (query, key and value are not one tensor): its "
                "projections have different inputs but PEFT gives them one A, so EVA adapts self-attention only; leave "
                "the layer out"
            )
        return self._batch_first(query.detach(), call.get("key_padding_mask"), mask)

    def _batch_first(self, x: Tensor, padding: Tensor | None, mask: Tensor | None) -> Tokens:
        if x.dim() == 3 and not self.module.batch_first:
            x = x.transpose(0, 1)
        mask = fit_mask(mask, x.shape[:-1], x.device)
        if padding is not None:
            counts = ~padding if padding.dtype is torch.bool else ~torch.isneginf(padding)
            mask = counts if mask is None else mask & counts
        return x, mask


class AttentionOutputs(AttentionInputs):
    """The inputs of ``nn.MultiheadAttention``'s output projection.

    They exist only inside torch's attention function, which reads the projection's weight and calls no layer. They are
    what the attention returns when that weight is the identity, so the attention runs once more.
    """

    kind: Hashable = "attention output"

    def read(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None) -> Tokens:
        attention: Any = self.module
        projection = attention.out_proj
        weight = projection.weight
        identity = nn.Linear(self.width, self.width, device="meta")
        identity.weight = nn.Parameter(torch.eye(self.width, device=weight.device, dtype=weight.dtype), False)
        identity.bias = nn.Parameter(torch.zeros(self.width, device=weight.device, dtype=weight.dtype), False)
        attention.out_proj = identity
        try:
            with torch.no_grad():
                x = attention.forward(*args, **kwargs)[0]
        finally:
            attention.out_proj = projection
        call = _attention_call(args, kwargs)
        padding = call.get("key_padding_mask") if call["key"] is call["query"] else None
        return self._batch_first(x, padding, mask)


def inputs_of(layer: nn.Module) -> LayerInputs:
    """How to read the inputs of a plain layer.

    Raises:
        InputTypeError: EVA has no matrix of tokens for a layer of this type.
    """
    if isinstance(layer, Convolution):
        return PatchInputs(layer, layer)
    if isinstance(layer, nn.MultiheadAttention):
        return AttentionInputs(layer)
    return LayerInputs(layer)


def layer_input(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor a layer was called on: its first positional argument or, called by keyword, its only tensor.

    Raises:
        InputTypeError: there is none.
    """
    if args and isinstance(args[0], Tensor):
        return args[0].detach()
    for key in ("input", "x", "hidden_states"):
        if isinstance(kwargs.get(key), Tensor):
            return kwargs[key].detach()
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if len(tensors) != 1:
        raise InputTypeError(f"layer {name!r} was called with {len(tensors)} tensors and none of them is named 'input'")
    return tensors[0].detach()


def fit_mask(mask: Tensor | None, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The mask for tokens of this shape: as given where it has that shape, flattened for flattened tokens, none for
    inputs that are not per token (a pooled vector)."""
    if mask is None:
        return None
    flattened = len(shape) == 1 and mask.numel() == shape[0]
    if mask.shape != shape and not flattened:
        return None
    setattr(mask, FITTED, True)
    mask = mask.to(device)
    return mask.reshape(-1) if flattened else mask


def _in_features(layer: nn.Module) -> int:
    features = getattr(layer, "in_features", None) or getattr(layer, "nx", None)
    if features is None:
        raise InputTypeError(
            f"a layer of type {type(layer).__name__} has no in_features; EVA adapts linear layers, convolutions and "
            "nn.MultiheadAttention"
        )
    return int(features)


def _padding(filters: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """What F.pad takes: left and right, last dimension first."""
    if filters.padding == "same":
        total = [d * (k - 1) for d, k in zip(filters.dilation, filters.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    elif isinstance(filters.padding, str):
        sides = [(0, 0) for _ in filters.kernel_size]
    else:
        sides = [(int(p), int(p)) for p in filters.padding]
    return tuple(v for side in reversed(sides) for v in side)


def _attention_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(("query", "key", "value", "key_padding_mask"), args, strict=False)), **kwargs}
