"""Activations out of a forward pass: hooks on layers, inputs shared by several layers, the choice of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.svd import StreamingSVD
from eva_lightning.tokens import LayerInputs


class SharingChanged(Exception):
    """Layers that shared an input no longer do, after the shared decomposition has moved on: start over without."""

    def __init__(self, layers: set[str]) -> None:
        super().__init__(", ".join(sorted(layers)))
        self.layers = layers


@dataclass
class _Seen:
    """The most recent distinct input of the forward pass under way. Holding the tensor keeps its address unique."""

    layer: str
    call: int
    tensor: Tensor
    version: int
    inputs: LayerInputs


@dataclass
class InputCapture:
    """Feeds each layer's inputs to its streaming SVD while a model runs.

    Layers that receive the same tensor (q, k and v; the halves of SwiGLU) are decomposed once: ``owner`` maps such a
    layer to the one whose engine stands for both. Identity is checked in every minibatch; a layer that stops sharing
    gets a copy of the engine if that is still exact, otherwise :class:`SharingChanged` asks for a fresh start.

    Attributes:
        layers: canonical name -> the inputs to watch.
        engines: canonical name -> engine; those of sharing layers stay empty until they stop sharing.
        tokens_per_sample: how many tokens of each sample to use, other ones in every minibatch; ``None`` for all.
        seed: seeds the order in which they are used.
        never_share: layers to decompose on their own.
    """

    layers: Mapping[str, LayerInputs]
    engines: dict[str, StreamingSVD]
    tokens_per_sample: int | None = None
    seed: int = 0
    never_share: set[str] = field(default_factory=set)
    mask: Tensor | None = None
    owner: dict[str, str] = field(default_factory=dict)
    n_batches: int = 0
    _calls: dict[str, int] = field(default_factory=dict)
    _last: _Seen | None = None
    _started: set[str] = field(default_factory=set)
    _chosen: dict[int, Tensor] = field(default_factory=dict)
    _broken: set[str] = field(default_factory=set)

    @contextmanager
    def watching(self) -> Iterator[InputCapture]:
        """Hooks on all layers for the duration of the body; none is left behind, whatever happens in it."""
        handles = []
        try:
            for name, inputs in self.layers.items():
                handles.append(inputs.module.register_forward_pre_hook(self._hook(name, inputs), with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def begin(self, mask: Tensor | None = None) -> None:
        """Start a minibatch. ``mask`` (bool) marks the tokens that count, for inputs of its shape."""
        self.n_batches += 1
        self.mask = mask
        self._calls.clear()
        self._chosen.clear()
        self._last = None

    def end(self) -> None:
        """Finish a minibatch: layers that shared must have run as often as their owner."""
        self._last = None
        uneven = {n for n, owner in self.owner.items() if self._calls.get(n, 0) != self._calls.get(owner, 0)}
        if uneven | self._broken:
            raise SharingChanged(uneven | self._broken)
        self._started.update(self._calls)

    def _hook(self, name: str, inputs: LayerInputs) -> Callable[..., None]:
        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._observe(name, inputs, *inputs.read(name, args, kwargs, self.mask))

        return observe

    @torch.no_grad()
    def _observe(self, name: str, inputs: LayerInputs, x: Tensor, mask: Tensor | None) -> None:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        last = self._last
        shared = last is not None and last.layer != name and last.call == call and _same_input(last, inputs, x)
        owner = self.owner.get(name)
        if owner is not None:
            if shared and last is not None and last.layer == owner:
                return
            if not self._split(name, owner, call):
                return
        elif shared and last is not None and call == 0 and x.numel() and self._may_share(name, last.layer):
            self.owner[name] = last.layer
            return
        if not shared:
            self._last = _Seen(name, call, x, x._version, inputs)
        try:
            with _full_precision(x.device):
                for tokens in inputs.tokens(x, mask, self._choose):
                    self.engines[name].update(*tokens)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"layer {name!r}: input of minibatch {self.n_batches} has NaN or infinite values ({error}); check the "
                "data and the precision"
            ) from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {name!r}: {error}") from None

    def _may_share(self, name: str, owner: str) -> bool:
        return not {name, owner} & self._started and name not in self.never_share

    def _split(self, name: str, owner: str, call: int) -> bool:
        """Give ``name`` an engine of its own from here on, if the owner's has not taken in more than ``name`` saw."""
        if name in self._broken or self._calls.get(owner, 0) > call:
            self._broken.add(name)
            return False
        self.engines[name] = self.engines[owner].clone()
        del self.owner[name]
        return True

    def _choose(self, tokens: int) -> Tensor | None:
        n = self.tokens_per_sample
        if n is None or tokens <= n:
            return None
        # going round one permutation shows every position equally often: where position embeddings dominate, as in the
        # first block of a vision transformer, fresh draws would weigh them by chance
        if tokens not in self._chosen:
            order = torch.randperm(tokens, generator=torch.Generator().manual_seed(self.seed))
            window = torch.arange(n * (self.n_batches - 1), n * self.n_batches) % tokens
            self._chosen[tokens] = order[window].sort().values
        return self._chosen[tokens]


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Out of the trainer's autocast and default dtype, which hold in hooks too and would round the engine's sums."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def _same_input(last: _Seen, inputs: LayerInputs, x: Tensor) -> bool:
    held = last.tensor
    if last.inputs.kind != inputs.kind:
        return False
    if held.shape != x.shape or held.dtype != x.dtype or held.device != x.device:
        return False
    if held.data_ptr() == x.data_ptr() and held.stride() == x.stride():
        return x._version == last.version
    # modules that copy their input per branch (autocast, .contiguous()) share values, not storage
    step = max(1, x.shape[0] // 4)
    return torch.equal(held[::step, ..., :4], x[::step, ..., :4]) and torch.equal(held, x)
