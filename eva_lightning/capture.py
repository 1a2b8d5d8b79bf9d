"""Activations out of a forward pass: hooks on layers, inputs shared by several layers, the choice of tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from eva_lightning.layer_inputs import LayerInputs, Tokens
from eva_lightning.svd import StreamingSVD
from eva_lightning.svd.inputs import flatten_tokens
from eva_lightning.token_subsampling import Price, TokenChoice


class SharingChanged(Exception):
    """Layers that shared an input no longer do, after the shared decomposition has moved on: start over without."""

    def __init__(self, layers: set[str]) -> None:
        super().__init__(", ".join(sorted(layers)))
        self.layers = layers


@dataclass
class _Seen:
    """The most recent distinct input of the forward pass under way.

    It is not kept alive: holding on to a large activation for longer than the model does makes the allocator ask the
    system for fresh pages in every layer (7% of a ViT-tiny's forward on a CPU). The weak reference keeps the address
    from being mistaken for that of a later tensor.
    """

    layer: str
    call: int
    inputs: LayerInputs
    storage: StorageWeakRef
    place: tuple[Any, ...]
    version: int
    tokens: Tensor | None
    tokens_version: int

    @classmethod
    def of(cls, layer: str, call: int, inputs: LayerInputs, x: Tensor, tokens: Tensor | None) -> _Seen:
        storage = StorageWeakRef(x.untyped_storage())
        return cls(
            layer, call, inputs, storage, _place(x), x._version, tokens, 0 if tokens is None else tokens._version
        )

    def is_same_memory(self, x: Tensor) -> bool:
        return not self.storage.expired() and self.place == _place(x) and self.version == x._version

    def has_same_tokens(self, tokens: Tensor) -> bool:
        """Modules that copy their input per branch (autocast, ``.contiguous()``) share values, not memory."""
        mine = self.tokens
        if mine is None or mine._version != self.tokens_version or mine.data_ptr() == tokens.data_ptr():
            return False
        if mine.shape != tokens.shape or mine.dtype != tokens.dtype or mine.device != tokens.device:
            return False
        step = max(1, len(mine) // 4)
        return torch.equal(mine[::step, ..., :4], tokens[::step, ..., :4]) and torch.equal(mine, tokens)


def _place(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device


@dataclass
class InputCapture:
    """Feeds each layer's inputs to its streaming SVD while a model runs.

    Layers that receive the same tensor (q, k and v; the halves of SwiGLU) are decomposed once: ``owner`` maps such a
    layer to the one whose engine stands for both. Identity is checked in every minibatch; a layer that stops sharing
    gets a copy of the engine if that is still exact, otherwise :class:`SharingChanged` asks for a fresh start.

    Attributes:
        layers: canonical name -> the inputs to watch.
        engines: canonical name -> engine; those of sharing layers stay empty until they stop sharing.
        choice: which tokens to use.
        never_share: layers to decompose on their own.
        paused: layers whose engines are given nothing for now.
    """

    layers: Mapping[str, LayerInputs]
    engines: dict[str, StreamingSVD]
    choice: TokenChoice = field(default_factory=TokenChoice)
    never_share: set[str] = field(default_factory=set)
    paused: frozenset[str] = frozenset()
    mask: Tensor | None = None
    owner: dict[str, str] = field(default_factory=dict)
    n_batches: int = 0
    _calls: dict[str, int] = field(default_factory=dict)
    _last: _Seen | None = None
    _started: set[str] = field(default_factory=set)
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

    @cached_property
    def _typical_flops(self) -> float:
        return statistics.median(e.flops_per_token(e.dim, e.k) for e in self.engines.values())

    def begin(self, mask: Tensor | None = None) -> None:
        """Start a minibatch. ``mask`` (bool) marks the tokens that count, for inputs of its shape."""
        self.n_batches += 1
        self.mask = mask
        self._calls.clear()
        self.choice.begin()
        self._last = None

    def end(self) -> None:
        """Finish a minibatch: layers that shared must have run as often as their owner."""
        self._last = None
        for name, engine in self.engines.items():
            with self._located(name):
                engine.verify()
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
        if last is not None and (last.layer == name or last.call != call or last.inputs.kind != inputs.kind):
            last = None
        shared = last is not None and last.is_same_memory(x)
        pieces: Iterable[Tokens] = inputs.tokens(x, mask, self.choice.of(self.owner.get(name, name)))
        if inputs.in_one_piece and not shared:
            pieces = list(pieces)
            # equal in the tokens that count is enough: where others differ, another minibatch will show it
            shared = last is not None and last.has_same_tokens(pieces[0][0])
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
            tokens = pieces[0][0] if isinstance(pieces, list) else None
            self._last = _Seen.of(name, call, inputs, x, tokens)
        if name in self.paused:
            return
        with self._located(name), _full_precision(x.device):
            self._take_in(name, inputs, pieces)
            if self.choice.is_open(name):
                self._learn(name, inputs, x, mask)

    def _take_in(self, name: str, inputs: LayerInputs, pieces: Iterable[Tokens]) -> None:
        for piece in pieces:
            self.engines[name].update(*piece)

    def _learn(self, name: str, inputs: LayerInputs, x: Tensor, mask: Tensor | None) -> None:
        """Find out from the layer's first tokens whether it needs more than others, and if so take them in too."""
        tokens, counts = next(iter(inputs.tokens(x, mask, self.choice.of(name))))
        tokens = flatten_tokens(tokens, counts, inputs.width)
        if not len(tokens):
            return
        engine = self.engines[name]
        flops = engine.flops_per_token(engine.dim, engine.k)
        product = 2 * engine.dim * _columns_of(inputs.module)
        price = Price(flops / self._typical_flops, flops / product if product else 0.0)
        self.choice.learn(name, tokens, engine.k, price)
        self._take_in(name, inputs, inputs.tokens(x, mask, self.choice.of(name, added=True)))

    @contextmanager
    def _located(self, name: str) -> Iterator[None]:
        try:
            yield
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
        self.choice.same(name, owner)
        del self.owner[name]
        return True


def _columns_of(module: nn.Module) -> int:
    return getattr(module, "out_features", None) or getattr(module, "out_channels", None) or 0


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
