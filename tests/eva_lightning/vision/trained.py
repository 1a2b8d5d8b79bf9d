"""A small image classifier with the adapters that EVA gave it, trained for a moment on noise."""

from __future__ import annotations

from typing import Any

import lightning as L
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eva_lightning import EVAInitCallback
from eva_lightning.vision import ImageClassifier

CLASSES, SIZE, MODEL = 3, 32, "test_vit"
IMAGES = torch.rand(12, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def trained(model: str = MODEL, **options: Any) -> ImageClassifier:
    """Adapters of rank 4 on average, biases and a head that are not what they were."""
    L.seed_everything(0, verbose=False)
    module = ImageClassifier(model, CLASSES, SIZE, lr=1e-2, **options)
    data = DataLoader(TensorDataset(IMAGES, torch.arange(12) % CLASSES), 4)
    L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EVAInitCallback(rho=2, r=4, lora={"bias": "all"}, verbose=False)],
    ).fit(module, data)  # fmt: skip
    return module.eval()


def base() -> nn.Module:
    """The network without adapters, built by timm: that of the seed by which random weights are drawn."""
    return ImageClassifier(MODEL, CLASSES, SIZE).model


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(IMAGES)
        return logits


def timm_model(**options: Any) -> nn.Module:
    """A model by timm's own factory."""
    return timm.create_model(MODEL, num_classes=CLASSES, img_size=SIZE, **options)
