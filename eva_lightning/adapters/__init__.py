"""LoRA layers in a module: find, inject, resize, remove, initialise, export and merge them.

Only the files of this package know PEFT, and they import it inside their functions: ``import peft`` pulls in
transformers and costs seconds that ``import eva_lightning`` should not.
"""

from __future__ import annotations

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.adapters.export import merge_and_unload, save_pretrained
from eva_lightning.adapters.injection import Injection, count_trainable, inject
from eva_lightning.adapters.lora_options import DEFAULT_ALPHA, DEFAULT_RANK
from eva_lightning.adapters.registry import find_adapters, find_skipped, fresh_adapters, has_adapters
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
    "fresh_adapters",
    "has_adapters",
    "inject",
    "merge_and_unload",
    "save_pretrained",
]
