"""The class that our callbacks inherit: a Callback for the Trainer and the LightningCLI of both copies of Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl

from eva_lightning.namespaces import lightning_classes

if TYPE_CHECKING:
    Callback = pl.Callback
else:

    class Callback(*lightning_classes("callbacks", "Callback")):
        """A Callback of every copy imported; of one imported later by :func:`join`."""


def join() -> None:
    """Make our callbacks those of a copy that was imported just now as well."""
    bases: tuple[Any, ...] = lightning_classes("callbacks.callback", "Callback")
    Callback.__bases__ = bases
