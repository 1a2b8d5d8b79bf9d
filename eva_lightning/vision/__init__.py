"""Image classification with EVA: timm backbones, VTAB-1K, a plain LightningModule.

:class:`ImageClassifier`, :class:`ImageFolderDataModule`, :class:`VTAB1K` and :func:`save_timm` are imported when
they are first used, so that a mistyped folder or task is reported before timm is loaded. The submodules:

- ``eva_lightning.vision.data.tasks``: the 19 tasks as a table
- ``eva_lightning.vision.data.splits``: reading and checking the folder
- ``tools.vtab.archive``, ``originals``, ``dataset_check``: getting the folder, building it, checking it
- ``eva_lightning.vision.data.datamodule``: :class:`VTAB1K`, the LightningDataModule
- ``eva_lightning.vision.data.image_folder``: :class:`ImageFolderDataModule`, any folder of images
- ``eva_lightning.vision.data.own_tasks``, ``split_table``: the layouts of such folders
- ``eva_lightning.vision.data.image_cache``: decoded images as a checksummed memory map
- ``eva_lightning.vision.backbone.timm_models``, ``weights``: timm models and where their weights come from
- ``eva_lightning.vision.backbone.position_embedding``: DINOv2's, resampled as the official code does
- ``eva_lightning.vision.backbone.split_fused``, ``fused_adapter``: q, k, v and SwiGLU's halves apart, and back together
- ``eva_lightning.vision.module``: :class:`ImageClassifier`, the LightningModule
- ``eva_lightning.vision.timm_export``: :func:`save_timm`, a merged model for users of timm
- ``eva_lightning.vision.protocol``: where the authors' code differs from the paper's text, as named fields
- ``eva_lightning.methods``: the methods, and what each does to an ImageClassifier
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eva_lightning.vision.data.datamodule import VTAB1K
    from eva_lightning.vision.data.image_folder import ImageFolderDataModule
    from eva_lightning.vision.module import ImageClassifier
    from eva_lightning.vision.timm_export import save_timm

__all__ = ["VTAB1K", "ImageClassifier", "ImageFolderDataModule", "save_timm"]

_HOMES = {
    "VTAB1K": "data.datamodule",
    "ImageClassifier": "module",
    "ImageFolderDataModule": "data.image_folder",
    "save_timm": "timm_export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
