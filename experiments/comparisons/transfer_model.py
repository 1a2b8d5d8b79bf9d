"""The small Vision Transformer of the transfer comparison, its pre-training, and its loss on held-out images."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, vit_tiny_patch16_224
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy

from eva_lightning.checkpoint_io import AtomicCheckpointIO
from eva_lightning.errors import InputError
from eva_lightning.files import replacing
from eva_lightning.side_effects import isolated_rng, observing
from eva_lightning.tensor_files import are_whole, write_tensors
from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.merged_evaluation import merged_in_fp32
from eva_lightning.vision.module import ImageClassifier
from experiments.comparisons.transfer_data import TransferData, as_fetched
from experiments.runner.run_folder import RunFolder, Work, perform
from experiments.runner.settings import Role, option

MODEL = "vit_transfer_patch12_48"
IMAGE_SIZE = 48

#: Side of the images that pre-training crops from, in pixels.
CROPPED_FROM = 64


def vit_transfer_patch12_48(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT for 48x48 images in 12x12 patches: width 64, 4 blocks, 4 heads; 0.23 M parameters.

    timm draws weights and position embeddings with standard deviation 0.02, made for wide models and long training.
    Here they are Glorot's, and positions have unit variance, as in :func:`eva_lightning.vision.digits.small_vit`.
    """
    shape = {"img_size": IMAGE_SIZE, "patch_size": 12, "embed_dim": 64, "depth": 4, "num_heads": 4}
    model: VisionTransformer = vit_tiny_patch16_224(pretrained, **(shape | options))
    if not pretrained:
        for layer in model.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        for embedding in (model.pos_embed, model.cls_token):
            if embedding is not None:
                nn.init.normal_(embedding)
    return model


register_model(vit_transfer_patch12_48)


def evaluate(module: nn.Module, images: SplitDataset, batch_size: int = 256) -> dict[str, float]:
    """Loss and accuracy of `module` on `images`, in evaluation mode; the module and random states stay as they were.

    Returns:
        ``loss``: mean cross-entropy in nats; ``accuracy``: share of images that is right; ``class_accuracy``: mean over
        the classes of `images` of the share of a class that is right.
    """
    device = next(module.parameters()).device
    loader = DataLoader(images, batch_size, collate_fn=as_fetched)
    with isolated_rng(), observing(module), torch.no_grad():
        logits = torch.cat([module(batch[0].to(device)).float().cpu() for batch in loader])  # (n, classes)
    labels, classes = images.labels, logits.shape[1]
    per_class = multiclass_accuracy(logits, labels, classes, average="none")
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float(multiclass_accuracy(logits, labels, classes, average="micro")),
        # not average="macro", which counts a class that is predicted but has no image here as wrong
        "class_accuracy": float(per_class[labels.unique()].mean()),
    }


class Evaluations(L.Callback):
    """Note what :func:`evaluate` gives after some epochs, counted from 1. Notes travel in checkpoints.

    Args:
        images: Held-out images.
        epochs: After which epochs.

    Attributes:
        rows: One mapping per evaluation: ``epoch`` and what :func:`evaluate` gives.
    """

    def __init__(self, images: SplitDataset, epochs: Collection[int]) -> None:
        self.images = images
        self.epochs = frozenset(epochs)
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate with adapters merged into the weights: the same function, a third faster."""
        epoch = trainer.current_epoch + 1
        if epoch not in self.epochs:
            return
        with contextlib.ExitStack() as stack:
            # weights that are not finite cannot be merged: training has diverged, which the loss will say
            with contextlib.suppress(InputError):
                stack.enter_context(merged_in_fp32(pl_module))
            self.rows.append({"epoch": epoch, **evaluate(pl_module, self.images)})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


def cpu_trainer(epochs: int, callbacks: Sequence[L.Callback], progress: bool = False) -> L.Trainer:
    """A Trainer on the CPU that logs and keeps nothing by itself."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Recipe of the weights that all methods start from."""

    model: str = option(MODEL, "the network", Role.RESULT)
    split_seed: int = option(0, "which half of the classes", Role.RESULT)
    epochs: int = option(60, "epochs", Role.RESULT, at_least=1)
    lr: float = option(2e-3, "peak learning rate", Role.RESULT)
    weight_decay: float = option(0.2, "AdamW's weight decay", Role.RESULT)
    batch_size: int = option(128, "images per step", Role.RESULT)
    seed: int = option(0, "of weights, order and crops", Role.RESULT)


def pretrain(
    recipe: Pretraining,
    classes: int,
    train: SplitDataset,
    held_out: SplitDataset,
    weights: Path,
    progress: bool = False,
) -> dict[str, Any]:
    """Train the backbone on random crops; a finished one is left as it is, an interrupted one resumed.

    Where the weights of a finished one are missing or damaged, it is trained again.

    Args:
        recipe: How.
        classes: Of `train`.
        train: Images of `CROPPED_FROM` pixels.
        held_out: Held-out images of `IMAGE_SIZE` pixels.
        weights: File for the weights, without the head; its folder is that of the run.
        progress: Show a progress bar.

    Returns:
        The metrics: ``evaluations`` by epoch, ``seconds``, ``images`` and ``classes``.

    Raises:
        InputError: The folder holds the weights of another recipe.
    """
    folder = RunFolder(weights.parent, recipe)

    def build() -> Work:
        L.seed_everything(recipe.seed, workers=True, verbose=False)
        module = ImageClassifier(
            recipe.model,
            classes,
            IMAGE_SIZE,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            warmup_epochs=recipe.epochs / 20,
        )
        data = TransferData(train, recipe.batch_size, recipe.seed, crop_to=IMAGE_SIZE)
        return lambda folder: _pretrain(module, data, held_out, recipe.epochs, folder, weights, progress)

    lost = folder.result() is not None and not are_whole(weights)
    metrics = perform(folder, build, terminal=False, overwrite=lost)
    folder.clear_checkpoints()
    return metrics


def _pretrain(
    module: ImageClassifier,
    data: TransferData,
    held_out: SplitDataset,
    epochs: int,
    folder: RunFolder,
    weights: Path,
    progress: bool,
) -> dict[str, Any]:
    every = max(1, epochs // 8)
    evaluations = Evaluations(held_out, {*range(every, epochs, every), epochs})
    clock = Timer()  # counts on after an interruption
    checkpoints = ModelCheckpoint(folder.checkpoints, "last", every_n_epochs=every, enable_version_counter=False)
    trainer = cpu_trainer(epochs, [evaluations, clock, checkpoints], progress)
    trainer.fit(module, datamodule=data, ckpt_path=folder.last_checkpoint())
    head = module.head_name.removeprefix("model.")
    state = {name: value for name, value in module.model.state_dict().items() if not name.startswith(f"{head}.")}
    with replacing(weights) as temporary:
        write_tensors(temporary, state)
    return {
        "evaluations": evaluations.rows,
        "seconds": clock.time_elapsed("train"),
        "images": len(data.train),
        "classes": module.hparams["num_classes"],
    }
