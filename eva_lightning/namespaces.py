"""Lightning under both its names: ``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one code.

The classes of one copy are unknown to the other. What is asked of a class here is asked of every copy that is imported;
nothing here imports either. Lightning itself refuses a module of one copy in a Trainer of the other.
"""

from __future__ import annotations

import sys
from typing import Any

from eva_lightning.errors import InputTypeError

NAMES = ("lightning.pytorch", "pytorch_lightning")
_FABRICS = ("lightning.fabric", "lightning_fabric")


def lightning_classes(module: str, *names: str) -> tuple[type[Any], ...]:
    """Those of the classes that exist in the copies imported, for ``isinstance``.

    Args:
        module: Where they are, below the copy's name: ``"strategies"``.
        names: Of the classes; one that a version of Lightning lacks is left out.
    """
    modules = [sys.modules[f"{copy}.{module}"] for copy in NAMES if f"{copy}.{module}" in sys.modules]
    return tuple(getattr(found, name) for found in modules for name in names if hasattr(found, name))


def namespace_of(cls: type) -> str | None:
    """The copy that a class, or the nearest one above it, is of."""
    found = (copy for base in cls.__mro__ for copy in NAMES if base.__module__.startswith(f"{copy}."))
    return next(found, None)


def is_lightning_module(module: object) -> bool:
    """Whether this is a LightningModule of either copy."""
    return isinstance(module, lightning_classes("core.module", "LightningModule"))


def is_set_up_by_fabric(instance: object) -> bool:
    """Whether Fabric, of either copy, has wrapped this: a model, or a loader."""
    imported = [sys.modules[name] for name in _FABRICS if hasattr(sys.modules.get(name), "is_wrapped")]
    return any(fabric.is_wrapped(instance) for fabric in imported)


def is_overridden(method: str, instance: object) -> bool:
    """Whether a LightningModule or LightningDataModule has its own `method`.

    Raises:
        InputTypeError: It is neither.
    """
    kinds = (*lightning_classes("core", "LightningModule"), *lightning_classes("core", "LightningDataModule"))
    if not isinstance(instance, kinds):
        raise InputTypeError(
            f"expected a LightningModule or LightningDataModule of {' or '.join(NAMES)}, got "
            f"{type(instance).__qualname__} of {type(instance).__module__}"
        )
    helpers = sys.modules[f"{namespace_of(type(instance))}.utilities.model_helpers"]
    return bool(helpers.is_overridden(method, instance))
