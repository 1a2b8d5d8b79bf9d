"""EVA for PyTorch Lightning: data-driven LoRA initialisation and ranks as one line in a Trainer."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from eva_lightning.callback import EVAInitCallback
from eva_lightning.checkpoint import load_from_checkpoint
from eva_lightning.forward import attention_mask
from eva_lightning.state import EVAState
from eva_lightning.streaming import StreamingOptions, compute_eva_state

try:
    __version__ = version("eva-lightning")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "EVAInitCallback",
    "EVAState",
    "StreamingOptions",
    "attention_mask",
    "compute_eva_state",
    "load_from_checkpoint",
]
