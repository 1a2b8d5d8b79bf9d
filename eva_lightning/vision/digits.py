"""Handwritten digits that need no download: data module, small Vision Transformer and LightningModule.

scikit-learn ships 1,797 real scans of handwritten digits (8x8 pixels, 17 grey levels; the test part of UCI's "Optical
Recognition of Handwritten Digits"). They are used at their native size: a :class:`timm.models.VisionTransformer` with
2x2 patches sees 16 patch tokens and the class token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.optim.parameter_groups import parameter_groups

PIXEL_MAX = 16.0
PIXEL_MEAN, PIXEL_STD = 0.305, 0.376  # of all 1,797 images once scaled to [0, 1]


@dataclass(frozen=True)
class DigitsSplit:
    """Three disjoint parts; each holds normalised images ``(n, 1, 8, 8)`` and labels ``(n,)`` counted from 0."""

    train: TensorDataset
    tune: TensorDataset
    test: TensorDataset


def load_digits_split(
    classes: Sequence[int], tune_share: float = 0.2, test_share: float = 0.3, seed: int = 0
) -> DigitsSplit:
    """Split the scans of ``classes`` at random into a training pool, a part for choosing settings and a test part.

    Every class is split by the same shares. Label ``i`` stands for digit ``classes[i]``.

    Raises:
        InputError: ``classes`` holds anything but distinct digits 0 .. 9, or the shares leave nothing to train on.
    """
    if not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
        raise InputError(f"classes must be distinct digits between 0 and 9, got {list(classes)}")
    if min(tune_share, test_share) < 0 or tune_share + test_share >= 1:
        raise InputError(f"tune_share + test_share must stay below 1, got {tune_share} + {test_share}")
    from sklearn.datasets import load_digits  # an extra

    bunch = load_digits()
    images = (torch.from_numpy(bunch.images).float() / PIXEL_MAX - PIXEL_MEAN) / PIXEL_STD
    digits = torch.from_numpy(bunch.target)
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for digit in classes:
        index = (digits == digit).nonzero().squeeze(1)
        index = index[torch.randperm(len(index), generator=generator)]
        n_tune, n_test = round(tune_share * len(index)), round(test_share * len(index))
        for part, piece in zip(parts, index.split([len(index) - n_tune - n_test, n_tune, n_test]), strict=True):
            part.append(piece)
    label_of = torch.full((10,), -1)
    label_of[list(classes)] = torch.arange(len(classes))
    return DigitsSplit(
        *(TensorDataset(images[i].unsqueeze(1), label_of[digits[i]]) for i in (torch.cat(p) for p in parts))
    )


def draw_labels(pool: TensorDataset, n_labels: int, seed: int) -> TensorDataset:
    """Draw ``n_labels`` images of ``pool``, the same number (up to one) from every class.

    Raises:
        InputError: a class has fewer images than its share, or ``n_labels`` is below the number of classes.
    """
    images, labels = pool.tensors
    classes = labels.unique().tolist()
    check_number("n_labels", n_labels, at_least=len(classes), whole=True)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for i, label in enumerate(classes):
        index = (labels == label).nonzero().squeeze(1)
        share = n_labels // len(classes) + (i < n_labels % len(classes))
        if share > len(index):
            raise InputError(f"n_labels={n_labels} asks for {share} images of class {label}, the pool has {len(index)}")
        chosen.append(index[torch.randperm(len(index), generator=generator)[:share]])
    picked = torch.cat(chosen)
    return TensorDataset(images[picked], labels[picked])


def random_shift(images: Tensor) -> Tensor:
    """Move every image of ``(n, 1, h, w)`` by -1, 0 or 1 pixel along each axis; blank paper moves in."""
    n, _, h, w = images.shape
    padded = F.pad(images, (1, 1, 1, 1), value=-PIXEL_MEAN / PIXEL_STD)
    dy, dx = torch.randint(0, 3, (2, n), device=images.device)
    rows = dy[:, None] + torch.arange(h, device=images.device)  # (n, h)
    columns = dx[:, None] + torch.arange(w, device=images.device)  # (n, w)
    batch = torch.arange(n, device=images.device)[:, None, None]
    return padded[batch, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


class DigitsDataModule(L.LightningDataModule):
    """scikit-learn's handwritten digits, restricted to some classes and, for few-label learning, to some labels.

    The split into training pool, tuning part and test part is fixed; ``seed`` draws the labelled images from the pool
    and orders the batches. The training loader owns its random generator, so the batch order depends on ``seed`` only
    and two methods that consume different amounts of randomness still see the same batches.

    Args:
        classes: digits to keep; label ``i`` stands for ``classes[i]``.
        n_labels: labelled training images, balanced over the classes; ``None`` takes the whole pool.
        evaluate_on: ``"test"``, or ``"tune"`` where settings are being chosen.
        shift: shift training images at random by up to one pixel.
        tune_share, test_share: of every class; see :func:`load_digits_split`.

    Raises:
        InputError: ``evaluate_on`` is neither of the two, or the labels asked for are not there.
    """

    def __init__(
        self,
        classes: Sequence[int] = (5, 6, 7, 8, 9),
        n_labels: int | None = 200,
        evaluate_on: str = "test",
        batch_size: int = 32,
        shift: bool = False,
        seed: int = 0,
        tune_share: float = 0.2,
        test_share: float = 0.3,
    ) -> None:
        super().__init__()
        check_choice("evaluate_on", evaluate_on, ("test", "tune"))
        self.classes = tuple(classes)
        self.n_labels = n_labels
        self.evaluate_on = evaluate_on
        self.batch_size = batch_size
        self.shift = shift
        self.seed = seed
        split = load_digits_split(self.classes, tune_share, test_share)
        self.train_set = split.train if n_labels is None else draw_labels(split.train, n_labels, seed)
        self.evaluation_set = split.test if evaluate_on == "test" else split.tune

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.evaluation_set, len(self.evaluation_set))

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        if self.shift and self.trainer is not None and self.trainer.training:
            return [random_shift(batch[0]), batch[1]]
        return batch


def small_vit(n_classes: int = 5, width: int = 96, depth: int = 4, heads: int = 4) -> VisionTransformer:
    """A Vision Transformer for 8x8 grey images in 2x2 patches, ``(n, 1, 8, 8) -> (n, n_classes)``; 0.45 M parameters.

    timm draws weights and position embeddings with standard deviation 0.02, made for wide models and long training; at
    this width positions then stay invisible for many epochs (68% after 20 epochs against 97%). Hence Glorot weights and
    position embeddings of unit variance.
    """
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=n_classes, embed_dim=width, depth=depth, num_heads=heads
    )
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    for embedding in (model.pos_embed, model.cls_token):
        if embedding is not None:
            nn.init.normal_(embedding)
    return model


class DigitsClassifier(L.LightningModule):
    """Cross-entropy training of ``model`` with AdamW, warm-up and cosine decay; logs ``val_loss`` and ``val_accuracy``.

    Args:
        model: maps ``(n, 1, 8, 8)`` images to ``(n, n_classes)`` logits.
        learning_rate: peak of the schedule.
        weight_decay: applied to matrices only, not to biases and norms.
        warmup_share: share of all steps spent warming up.
    """

    def __init__(
        self, model: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 0.05, warmup_share: float = 0.1
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_share = warmup_share

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        accuracy = multiclass_accuracy(logits, labels, logits.shape[1], average="micro")
        self.log_dict({"val_loss": F.cross_entropy(logits, labels), "val_accuracy": accuracy}, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        parameters, lr = self.named_parameters(), self.learning_rate
        optimizer = torch.optim.AdamW(parameter_groups(parameters, lr, self.weight_decay, decay_matrices_only=True))
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(self.warmup_share * steps))
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup)),
            ],
            [warmup],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
