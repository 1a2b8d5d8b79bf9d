"""EVA for PyTorch Lightning: data-driven LoRA initialisation and ranks as one line in a Trainer.

Importing this package is all that ``MyModule.load_from_checkpoint`` needs to load checkpoints with redistributed ranks
(:mod:`eva_lightning.on_import`).
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from eva_lightning import on_import

if TYPE_CHECKING:
    from eva_lightning.batch_forward import attention_mask
    from eva_lightning.callback import EVAInitCallback
    from eva_lightning.checkpoint import load_from_checkpoint
    from eva_lightning.checkpoint_io import AtomicCheckpointIO
    from eva_lightning.standalone import initialize
    from eva_lightning.state import EVAState
    from eva_lightning.streaming import compute_eva_state
    from eva_lightning.streaming_options import StreamingOptions

try:
    __version__ = version("eva-lightning")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AtomicCheckpointIO",
    "EVAInitCallback",
    "EVAState",
    "StreamingOptions",
    "attention_mask",
    "compute_eva_state",
    "initialize",
    "load_from_checkpoint",
]

# imported when first used: the engine alone must not cost the seconds that Lightning takes
_HOMES = {
    "AtomicCheckpointIO": "checkpoint_io",
    "EVAInitCallback": "callback",
    "EVAState": "state",
    "StreamingOptions": "streaming_options",
    "attention_mask": "batch_forward",
    "compute_eva_state": "streaming",
    "initialize": "standalone",
    "load_from_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


on_import.install()
