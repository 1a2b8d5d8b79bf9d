"""Old names of :mod:`eva_lightning.methods.apply`, until nothing imports them."""

from __future__ import annotations

from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.keys import METHOD_TRAITS, MethodKey, eva_state_kind

__all__ = ["METHODS", "AdapterOptions", "MethodKey", "apply_method", "eva_state_kind"]

METHODS = METHOD_TRAITS
