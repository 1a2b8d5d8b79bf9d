"""Lightning under both its names: ``lightning.pytorch`` and ``pytorch_lightning`` are two copies of one code.

The classes of one copy are unknown to the other. What is asked of a class here is asked of every copy that is imported;
Lightning itself refuses a module of one copy in a Trainer of the other.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import model_helpers

from eva_lightning.errors import InputTypeError

NAMES = ("lightning.pytorch", "pytorch_lightning")


def lightning_classes(module: str, *names: str) -> tuple[type, ...]:
    """Those of the classes that exist in the copies imported, for ``isinstance``.

    Args:
        module: Where they are, below the copy's name: ``"strategies"``.
        names: Of the classes; one that a version of Lightning lacks is left out.
    """
    modules = [sys.modules[f"{copy}.{module}"] for copy in NAMES if f"{copy}.{module}" in sys.modules]
    return tuple(getattr(found, name) for found in modules for name in names if hasattr(found, name))


def namespace_of(cls: type) -> str:
    """The copy that a LightningModule's class is of."""
    return next(copy for copy in NAMES for base in cls.__mro__ if base.__module__.startswith(f"{copy}."))


def is_lightning_module(module: object) -> bool:
    """Whether this is a LightningModule of either copy."""
    return isinstance(module, lightning_classes("core.module", "LightningModule"))


def is_overridden(method: str, instance: object) -> bool:
    """Whether the class of a LightningModule or LightningDataModule has its own `method`.

    Raises:
        InputTypeError: It is neither.
    """
    parents = [
        *lightning_classes("core.module", "LightningModule"),
        *lightning_classes("core.datamodule", "LightningDataModule"),
    ]
    for parent in parents:
        if isinstance(instance, parent):
            return model_helpers.is_overridden(method, instance, parent)
    raise InputTypeError(
        f"expected a LightningModule or LightningDataModule of {' or '.join(NAMES)}, got {type(instance).__qualname__} "
        f"of {type(instance).__module__}"
    )


if TYPE_CHECKING:
    Callback = pl.Callback
else:

    class Callback(*lightning_classes("callbacks.callback", "Callback")):
        """A Callback of every copy: ``pytorch_lightning`` may be imported later (:func:`join_callbacks`)."""


def join_callbacks() -> None:
    """Make our callbacks those of a copy imported just now as well, for its Trainer and its LightningCLI."""
    bases: tuple[Any, ...] = lightning_classes("callbacks.callback", "Callback")
    Callback.__bases__ = bases
