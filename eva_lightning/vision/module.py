"""An image classifier as a plain LightningModule: cross-entropy, AdamW, linear warm-up and cosine decay."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from .backbones import classifier_name, create_backbone
from .parameter_groups import Multiplier, layer_decay, parameter_groups
from .vtab import Batch
from .weights import Weights


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Factor on the learning rate: linear from ``1 / warmup_steps`` to 1, then a half cosine to 0 (section D.2)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class ImageClassifier(L.LightningModule):
    """A timm backbone with a linear head, trained with the settings of the EVA paper (section D.2).

    ``forward`` maps images to logits and a batch is ``(images, labels)``: nothing here knows of adapters, which a
    callback (EVA) or :func:`eva_lightning.adapters.inject` (LoRA, DoRA) puts into it. Trained is what has
    ``requires_grad``. Logged per epoch: ``train_loss``, ``train_accuracy``, ``val_…``, ``test_…``.

    Example::

        module = ImageClassifier("vit_tiny_patch16_224", num_classes=102)
        L.Trainer(max_epochs=30, callbacks=[EVAInitCallback(rho=2)]).fit(module, VTAB1K(root, "caltech101"))

    Args:
        model: timm name, or ``dinov2_s14``, ``dinov2_b14``, ``dinov2_l14``, ``dinov2_g14``.
        num_classes: Number of labels.
        image_size: Height and width of the images, in pixels.
        weights: Resolved weights of the backbone. Not a hyper-parameter: a checkpoint holds the weights.
        lr: Peak learning rate.
        weight_decay: AdamW's weight decay.
        warmup_epochs: Epochs of linear warm-up.
        layer_decay: Factor on the learning rate per layer counted from the head (the paper's 0.75 for full
            fine-tuning), or None.
        decay_matrices_only: No weight decay on parameters of one dimension (biases, norms).

    Attributes:
        lr_multipliers: From a parameter's name in this module (such as
            ``"model.blocks.0.attn.qkv.lora_B.default.weight"``) to a further factor on its learning rate, or None. For
            methods to set before ``fit`` (LoRA+ trains B faster than A); composes with `layer_decay`.
    """

    def __init__(
        self,
        model: str,
        num_classes: int,
        image_size: int = 224,
        weights: Weights | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup_epochs: float = 3.0,
        layer_decay: float | None = None,
        decay_matrices_only: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.layer_decay = layer_decay
        self.decay_matrices_only = decay_matrices_only
        self.lr_multipliers: Multiplier | None = None
        self.model = create_backbone(model, num_classes, image_size, weights)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @property
    def head_name(self) -> str:
        """Name of the output layer within this module."""
        return f"model.{classifier_name(self.model)}"

    def train_only_head(self) -> None:
        """Freeze everything but the output layer (linear probing)."""
        self.requires_grad_(False)
        self.get_submodule(self.head_name).requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._step(batch, "test", self.test_accuracy)

    def _step(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        # the loss in fp32 also under bf16-true: 8 bits of mantissa are too few for a log-sum-exp over 397 classes
        logits = self(images).float()
        loss = F.cross_entropy(logits, labels)
        accuracy(logits, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters and a learning rate set per step."""
        total = int(self.trainer.estimated_stepping_batches)
        epochs = max(1, self.trainer.max_epochs or 1)
        warmup = min(total, round(total * self.warmup_epochs / epochs))
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        multipliers: list[Multiplier] = [] if self.lr_multipliers is None else [self.lr_multipliers]
        if self.layer_decay is not None:
            by_layer = layer_decay(self.model, self.layer_decay)
            multipliers.append(lambda name: by_layer[name.removeprefix("model.")])
        return parameter_groups(
            self.named_parameters(),
            self.lr,
            self.weight_decay,
            multipliers=multipliers,
            decay_matrices_only=self.decay_matrices_only,
        )
