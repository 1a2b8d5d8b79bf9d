"""EVA and its ablations: :class:`~eva_lightning.callback.EVAInitCallback` does everything at the start of ``fit``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L

from eva_lightning.methods.apply import AdapterOptions, Where


def prepare(
    module: L.LightningModule, options: AdapterOptions, where: Where, *, use_dora: bool = False, **fixed: Any
) -> list[L.Callback]:
    """The callback for `options`, of which `fixed` are not the user's."""
    return [replace(options, **fixed).callback(where, use_dora)]
