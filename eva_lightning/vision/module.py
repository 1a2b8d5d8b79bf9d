"""An image classifier as a plain LightningModule: cross-entropy, AdamW, linear warm-up and cosine decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from eva_lightning.errors import InputError, unknown
from eva_lightning.optim.parameter_groups import Multiplier, layer_decay, parameter_groups
from eva_lightning.optim.schedules import SCHEDULES
from eva_lightning.vision.backbone.position_embedding import PositionEmbedding
from eva_lightning.vision.backbone.timm_models import classifier_name, create_backbone
from eva_lightning.vision.backbone.weights import Weights
from eva_lightning.vision.data.datamodule import Batch


class EpochMeans:
    """Mean loss and accuracy of an epoch, summed on the device: what a step costs is two additions and no transfer."""

    def __init__(self) -> None:
        self._loss: Tensor | None = None
        self._correct: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: mean loss ``()``, logits ``(B, classes)``, labels ``(B,)``."""
        loss = loss.detach() * len(labels)
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        self._loss = loss if self._loss is None else self._loss + loss
        self._correct = correct if self._correct is None else self._correct + correct
        self._count += len(labels)

    def totals(self) -> Tensor | None:
        """Loss, correct answers and examples, shape ``(3,)``, fp32; None before any batch. Starts anew."""
        loss, correct, count = self._loss, self._correct, self._count
        self.__init__()  # type: ignore[misc]
        if loss is None or correct is None:
            return None
        return torch.stack([loss.float(), correct.float(), correct.new_tensor(count).float()])


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
        schedule: Name of the learning-rate schedule in :data:`eva_lightning.optim.schedules.SCHEDULES`.
        split_fused: Take fused projections of the backbone apart (:mod:`eva_lightning.vision.backbone.split_fused`).
        position_embedding, model_options: See :func:`~eva_lightning.vision.backbone.timm_models.create_backbone`.

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
        schedule: str = "cosine",
        split_fused: bool = False,
        position_embedding: PositionEmbedding = "official",
        model_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.layer_decay = layer_decay
        self.decay_matrices_only = decay_matrices_only
        self.lr_multipliers: Multiplier | None = None
        if schedule not in SCHEDULES:
            raise InputError(unknown("schedule", schedule, SCHEDULES))
        self.schedule = SCHEDULES[schedule]
        self.model = create_backbone(
            model,
            num_classes,
            image_size,
            weights,
            position_embedding=position_embedding,
            split=split_fused,
            options=model_options,
        )
        self._means = {stage: EpochMeans() for stage in ("train", "val", "test")}

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
        return self._step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to the epoch's loss and accuracy."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to the epoch's loss and accuracy."""
        self._step(batch, "test")

    def _step(self, batch: Batch, stage: str) -> Tensor:
        images, labels = batch
        # the loss in fp32 also under bf16-true: 8 bits of mantissa are too few for a log-sum-exp over 397 classes
        logits = self(images).float()
        loss = F.cross_entropy(logits, labels)
        self._means[stage].add(loss, logits, labels)
        return loss

    def on_train_epoch_start(self) -> None:
        """Leave what an interrupted epoch counted behind."""
        self._means["train"] = EpochMeans()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the epoch's means with its last batch: callbacks see them at the end of the epoch, before the module."""
        if self.trainer.is_last_batch:
            self._log_means("train")

    def on_validation_epoch_start(self) -> None:
        """Start to count."""
        self._means["val"] = EpochMeans()

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._log_means("val")

    def on_test_epoch_start(self) -> None:
        """Start to count."""
        self._means["test"] = EpochMeans()

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._log_means("test")

    def _log_means(self, stage: str) -> None:
        totals = self._means[stage].totals()
        if totals is None:
            return
        if self.trainer.world_size > 1:
            gathered = self.all_gather(totals)
            assert isinstance(gathered, Tensor)
            totals = gathered.sum(dim=0)
        loss, correct, count = totals
        # batch_size: Lightning would look for one in the batch
        self.log(f"{stage}_loss", loss / count, on_step=False, on_epoch=True, batch_size=1)
        self.log(f"{stage}_accuracy", correct / count, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters and a learning rate set per step."""
        total = int(self.trainer.estimated_stepping_batches)
        epochs = max(1, self.trainer.max_epochs or 1)
        warmup = min(total, round(total * self.warmup_epochs / epochs))
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, warmup, total))
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
