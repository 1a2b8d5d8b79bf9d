"""LoRA layers in a module: find, inject, resize, remove, initialise, export and merge them.

Only the files of this package know PEFT, and they import it inside their functions: ``import peft`` pulls in
transformers and costs seconds that ``import eva_lightning`` should not.
"""

from __future__ import annotations

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.export import save_pretrained
from eva_lightning.adapters.injection import Injection, count_trainable, inject
from eva_lightning.adapters.lora_options import DEFAULT_ALPHA, DEFAULT_RANK
from eva_lightning.adapters.merge import merge_and_unload
from eva_lightning.adapters.registry import (
    find_adapters,
    find_skipped,
    has_adapters,
    refuse_frozen,
    refuse_merged,
    refuse_trained,
    wanted_adapters,
)
from eva_lightning.adapters.targets import choose_layers, find_head, find_targets

__all__ = [
    "DEFAULT_ALPHA",
    "DEFAULT_RANK",
    "AdapterLayer",
    "Injection",
    "choose_layers",
    "count_trainable",
    "find_adapters",
    "find_head",
    "find_skipped",
    "find_targets",
    "has_adapters",
    "inject",
    "merge_and_unload",
    "refuse_frozen",
    "refuse_merged",
    "refuse_trained",
    "save_pretrained",
    "wanted_adapters",
]
