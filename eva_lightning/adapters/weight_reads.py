"""Adapted layers whose weight the model also reads, as a tied decoder does (``F.linear(h, self.encoder.weight.T)``).

An adapter has no effect there, and merged into the weight it would have one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.errors import InputError

_MARK = "_eva_lightning_read_elsewhere"

# operations that give a tensor, but none of the weight's values
_VALUELESS = frozenset(
    {"type_as", "expand_as", "view_as", "reshape_as", "zeros_like", "ones_like", "empty_like", "full_like"}
    | {"rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full"}
)


class WeightReads:
    """Looks at one forward pass, and names the layers whose weight was used outside of their own.

    Reading what is no value, such as ``layer.weight.dtype``, does not count. Nor does a module's use of a parameter of
    its own that it shares with the layer: it keeps that parameter when the layer is merged.

    Args:
        module: runs the layers.
        layers: canonical name -> layer.

    Attributes:
        found: names of the layers.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
        self.found: list[str] = []
        self._has_looked = False
        self._running: list[nn.Module] = []
        self._weights: dict[int, list[tuple[str, AdapterLayer]]] = {}
        # PEFT's attention layer drops its parameters in a call: kept, or the next tensor might get the id of one
        self._kept: list[Tensor] = []
        below: set[int] = set()
        for name, layer in layers.items():
            below |= {id(m) for m in layer.module.modules()} - {id(layer.base)}
            for path, p in layer.base.named_parameters():
                if "bias" not in path.rpartition(".")[2] and ".lora_" not in f".{path}":
                    self._kept.append(p)
                    self._weights.setdefault(id(p), []).append((name, layer))
        # of weight_norm and the like before torch 2, which put another tensor there in every call
        self._computed = [(n, x) for n, x in layers.items() if isinstance(vars(x.base).get("weight"), Tensor)]
        others = [m for m in module.modules() if id(m) not in below]
        self._owners = {(id(m), id(p)) for m in others for p in m.parameters(recurse=False)}

    def in_first(self, context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
        """``context``, with a look at what runs in it when it is entered for the first time."""

        @contextmanager
        def entered() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(context())
                if not self._has_looked:
                    self._has_looked = True
                    stack.enter_context(self._looking())
                yield

        return entered

    @contextmanager
    def _looking(self) -> Iterator[None]:
        def enter(module: nn.Module, _: Any) -> None:
            self._running.append(module)

        def leave(module: nn.Module, *_: Any) -> None:
            while self._running and self._running.pop() is not module:
                pass

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            with _Mode(self._note), warnings.catch_warnings():
                # a compiled model runs once inside its wrapper: that these hooks see both does no harm
                warnings.filterwarnings("ignore", message="Using `torch.compile.* when there are global hooks")
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, tensor: Tensor) -> None:
        computed = [(name, layer) for name, layer in self._computed if vars(layer.base).get("weight") is tensor]
        layers = [*self._weights.get(id(tensor), []), *computed]
        own = {id(m) for _, layer in layers for m in (layer.module, layer.base)}
        if not layers or any(id(m) in own for m in self._running):
            return
        if self._running and (id(self._running[-1]), id(tensor)) in self._owners:
            return
        self.found += [name for name, _ in layers if name not in self.found]


class _Mode(TorchFunctionMode):
    """Calls ``note`` with every tensor whose values an operation of torch uses."""

    def __init__(self, note: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _VALUELESS and _has_tensor(result):
            # x.to(weight) asks for its precision
            used = args[:1] if name == "to" else (*args, *(kwargs or {}).values())
            for value in used:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, Tensor):
                        self._note(tensor)
        return result


def _has_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (isinstance(result, (list, tuple)) and any(map(_has_tensor, result)))


def mark_read_elsewhere(layers: Iterable[AdapterLayer]) -> None:
    """Note on layers that the model reads their weights."""
    for layer in layers:
        setattr(layer.module, _MARK, True)


def is_read_elsewhere(layer: AdapterLayer) -> bool:
    """Whether :func:`mark_read_elsewhere` noted that."""
    return hasattr(layer.module, _MARK)


def refuse_read_elsewhere(layer: AdapterLayer, remedy: str) -> None:
    """Make sure that a change of the layer's weight reaches nothing but the layer.

    Raises:
        InputError: its weight is read elsewhere, and its adapter is trained.
    """
    if is_read_elsewhere(layer) and not layer.is_fresh:
        raise InputError(
            f"layer {layer.name!r} cannot be merged: its weight is also read elsewhere in the model (as a tied decoder "
            f"does), where its adapter has no effect but a merged weight would have one; {remedy}"
        )
