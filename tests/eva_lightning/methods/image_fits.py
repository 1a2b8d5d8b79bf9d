"""A small image classifier and a quiet way to fit it, for tests of the methods on images."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn

from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.module import ImageClassifier

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "limit_val_batches": 0, "enable_checkpointing": False,
}  # fmt: skip


def plain(lr: float = 1e-2, **options: Any) -> ImageClassifier:
    """A classifier whose head tells inputs apart, so that a change of the function shows in the logits."""
    L.seed_everything(0, verbose=False)
    module = ImageClassifier("test_vit", num_classes=4, image_size=32, lr=lr, warmup_epochs=1, **options)
    nn.init.normal_(module.model.head.weight, std=0.5)  # type: ignore[union-attr, arg-type]
    return module


def fit(module: ImageClassifier, callbacks: list[L.Callback], data: VTAB1K, **options: Any) -> L.Trainer:
    checkpoint = options.pop("ckpt_path", None)
    trainer = L.Trainer(callbacks=callbacks, **QUIET, **options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return trainer
