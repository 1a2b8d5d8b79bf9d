"""Old names of :mod:`eva_lightning.methods.registry`, until nothing imports them."""

from __future__ import annotations

from eva_lightning.methods.registry import (
    DEFAULT_RHO,
    METHODS,
    Method,
    MethodKey,
    StateKind,
    method_names,
)  # fmt: skip

__all__ = ["DEFAULT_RHO", "METHOD_TRAITS", "MethodKey", "MethodTraits", "StateKind", "eva_state_kind"]

MethodTraits = Method
METHOD_TRAITS = {name: METHODS[name] for name in method_names("vision")}


def eva_state_kind(method: str) -> StateKind | None:
    """Use ``MethodKey.parse(method).state_kind``."""
    return MethodKey.parse(method).state_kind
