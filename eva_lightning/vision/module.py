"""An image classifier as a plain LightningModule: cross-entropy, AdamW, linear warm-up and cosine decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from eva_lightning.optim.parameter_groups import Multiplier, layer_decay, parameter_groups
from eva_lightning.optim.schedules import named_schedule, set_per_step
from eva_lightning.vision.backbone.position_embedding import PositionEmbedding
from eva_lightning.vision.backbone.timm_models import classifier_name, create_backbone
from eva_lightning.vision.backbone.weights import Weights
from eva_lightning.vision.data.datamodule import Batch


class ImageClassifier(L.LightningModule):
    """A timm backbone with a linear head, trained with the settings of the EVA paper (section D.2).

    ``forward`` maps images to logits and a batch is ``(images, labels)``: nothing here knows of adapters, which a
    callback (EVA) or :func:`eva_lightning.adapters.inject` (LoRA, DoRA) puts into it. Trained is what has
    ``requires_grad``. Logged per epoch: ``train_loss``, ``train_accuracy``, ``val_…``, ``test_…``.

    Example::

        module = ImageClassifier("vit_tiny_patch16_224", num_classes=102)
        L.Trainer(max_epochs=30, callbacks=[EVAInitCallback(rho=2)]).fit(module, VTAB1K(root, "caltech101"))

    Any folder of images: :class:`~eva_lightning.vision.ImageFolderDataModule`. ``Trainer.predict`` gives logits.

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
        position_embedding, model_options, head_init: See
            :func:`~eva_lightning.vision.backbone.timm_models.create_backbone`.

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
        head_init: str = "normal",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["weights"])
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup_epochs = warmup_epochs
        self.layer_decay = layer_decay
        self.decay_matrices_only = decay_matrices_only
        self.lr_multipliers: Multiplier | None = None
        self.schedule = named_schedule(schedule)
        self.model = create_backbone(
            model,
            num_classes,
            image_size,
            weights,
            position_embedding=position_embedding,
            split=split_fused,
            options=model_options,
            head_init=head_init,
        )
        # 0.7 ms a step, 0.2 ms by sums of our own: far below 5% of an epoch. Neither metric waits for the device, as no
        # argument is checked, nor NaN removed.
        self._means = nn.ModuleDict()
        for stage in ("train", "val", "test"):
            self._means[f"{stage}_loss"] = MeanMetric(nan_strategy="disable")
            self._means[f"{stage}_accuracy"] = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

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
        return self._step(batch, "train")[0]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to the epoch's loss and accuracy."""
        self._step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add to the epoch's loss and accuracy; logits ``(B, num_classes)`` fp32, for callbacks."""
        return self._step(batch, "test")[1]

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits ``(B, num_classes)`` of the images of a batch."""
        logits: Tensor = self(batch[0])
        return logits

    def _step(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        """Loss and logits, in fp32."""
        images, labels = batch
        # the loss in fp32 also under bf16-true: 8 bits of mantissa are too few for a log-sum-exp over 397 classes
        logits = self(images).float()
        loss = F.cross_entropy(logits, labels)
        # once per example, as batches differ in size
        self._mean(stage, "loss").update(loss.detach().expand(len(labels)))
        self._mean(stage, "accuracy").update(logits.detach(), labels)
        return loss, logits

    def on_train_epoch_start(self) -> None:
        """Reset the means, which an interrupted epoch may have left half-way."""
        self._reset_means("train")

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the epoch's means with its last batch: callbacks see them at the end of the epoch, before the module."""
        if self.trainer.is_last_batch:
            self._log_means("train")

    def on_validation_epoch_start(self) -> None:
        """Reset the means."""
        self._reset_means("val")

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` and ``val_accuracy``."""
        self._log_means("val")

    def on_test_epoch_start(self) -> None:
        """Reset the means."""
        self._reset_means("test")

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss`` and ``test_accuracy``."""
        self._log_means("test")

    def _mean(self, stage: str, kind: str) -> Metric:
        metric = self._means[f"{stage}_{kind}"]
        assert isinstance(metric, Metric)
        return metric

    def _reset_means(self, stage: str) -> None:
        # a Trainer of precision bf16-true turns the sums into bf16 too
        self._mean(stage, "loss").set_dtype(torch.float32).reset()
        self._mean(stage, "accuracy").reset()

    def _log_means(self, stage: str) -> None:
        for kind in ("loss", "accuracy"):
            # compute() gathers from all processes; batch_size: Lightning would look for one in the batch
            mean = self._mean(stage, kind).compute()
            in_bar = kind == "accuracy"
            self.log(f"{stage}_{kind}", mean, on_step=False, on_epoch=True, prog_bar=in_bar, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the trainable parameters and a learning rate set per step."""
        total = int(self.trainer.estimated_stepping_batches)
        epochs = max(1, self.trainer.max_epochs or 1)
        warmup = min(total, round(total * self.warmup_epochs / epochs))
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.lr, weight_decay=self.weight_decay)
        return set_per_step(optimizer, lambda step: self.schedule(step, warmup, total))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        multipliers = [self.lr_multipliers]
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
