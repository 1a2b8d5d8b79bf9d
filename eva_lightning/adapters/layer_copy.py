"""Copies of layers and models to try things on, and the structure of a module put back after a change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def independent_copy(module: nn.Module, shared: Iterable[Tensor] = ()) -> Any:
    """A deep copy that can be changed and run without effect on ``module``.

    Functions of hooks and Lightning's Trainer stay what they are: a copy of a bound method would copy its owner.

    Args:
        module: any module.
        shared: parameters and buffers whose memory the copy may share; it must not write into them.
    """
    memo: dict[int, Any] = {}
    for m in module.modules():
        for name, value in vars(m).items():
            if name in ("_trainer", "_fabric"):
                memo[id(value)] = None
            elif "hooks" in name and isinstance(value, dict):
                memo |= {id(hook): hook for hook in value.values()}
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()  # old weight norm's weight, which deepcopy refuses
    for tensor in shared:
        if type(tensor) is nn.Parameter:
            memo[id(tensor)] = nn.Parameter(tensor.data, tensor.requires_grad)
        elif type(tensor) is Tensor:  # others, such as quantised ones, know how they are copied
            memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(module, memo)


def remember_structure(module: nn.Module) -> Callable[[], None]:
    """A function that puts every sub-module, parameter, buffer, hook and attribute of ``module`` back in its place.

    Values are not remembered: tensors written into stay written.
    """
    parts = [
        (
            m,
            m.__class__,
            dict(vars(m)),
            [(v, copy.copy(v)) for v in vars(m).values() if isinstance(v, (dict, list))],
        )
        for m in module.modules()
    ]

    def restore() -> None:
        for m, kind, attributes, containers in parts:
            m.__class__ = kind
            vars(m).clear()
            vars(m).update(attributes)
            for container, content in containers:
                # the same object with its old content: handles of hooks refer to it
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)

    return restore
