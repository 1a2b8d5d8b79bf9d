"""The small Vision Transformer of the transfer experiment, its pre-training, and its loss on held-out images."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, vit_tiny_patch16_224
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from eva_lightning.adapters import has_adapters, merge_and_unload
from eva_lightning.side_effects import isolated_rng, observing
from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.module import ImageClassifier
from experiments.runner.run_folder import RunFolder
from experiments.vtab.transfer_data import TransferData

MODEL = "vit_transfer_patch12_48"
IMAGE_SIZE = 48

#: Side of the images that pre-training crops from, in pixels.
CROPPED_FROM = 64

_LOGGER = logging.getLogger("experiments.vtab.transfer")


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


def held_out(module: nn.Module, images: SplitDataset, batch_size: int = 256) -> dict[str, float]:
    """How well `module` does on `images`, in evaluation mode; leaves no trace in it.

    Returns:
        ``loss``: mean cross-entropy in nats; ``accuracy``: share that is right; ``class_accuracy``: the mean over
        classes of the share of a class that is right.
    """
    losses, right, labels = [], [], []
    device = next(module.parameters()).device
    with isolated_rng(), observing(module), torch.no_grad():
        for batch in DataLoader(images, batch_size, collate_fn=lambda fetched: fetched):
            logits = module(batch[0].to(device)).float().cpu()
            losses.append(F.cross_entropy(logits, batch[1], reduction="none"))
            right.append(logits.argmax(1) == batch[1])
            labels.append(batch[1])
    hits, truth = torch.cat(right).float(), torch.cat(labels)
    per_class = [float(hits[truth == label].mean()) for label in truth.unique()]
    return {
        "loss": float(torch.cat(losses).mean()),
        "accuracy": float(hits.mean()),
        "class_accuracy": sum(per_class) / len(per_class),
    }


class HeldOut(L.Callback):
    """Note :func:`held_out` after the epochs asked for, counted from 1. Notes travel in checkpoints.

    Args:
        images: What to look at.
        epochs: When.

    Attributes:
        rows: One mapping per look: ``epoch`` and what :func:`held_out` gives.
    """

    def __init__(self, images: SplitDataset, epochs: Collection[int]) -> None:
        self.images = images
        self.epochs = frozenset(epochs)
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, if it is asked for."""
        epoch = trainer.current_epoch + 1
        if epoch in self.epochs:
            model: Any = pl_module.model
            self.rows.append({"epoch": epoch, **held_out(_merged(model), self.images)})

    def state_dict(self) -> dict[str, Any]:
        """The notes so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the notes of the checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]


def _merged(model: nn.Module) -> nn.Module:
    """`model` or, where it has adapters, a copy with these added to the weights: the same function, a third faster."""
    if not has_adapters(model):
        return model
    try:
        return merge_and_unload(copy.deepcopy(model))
    except ValueError:
        return model  # not finite: training has diverged, which the loss will say


@dataclass(frozen=True)
class Pretraining:
    """Recipe of the weights that all methods start from."""

    split_seed: int = 0
    epochs: int = 60
    lr: float = 2e-3
    weight_decay: float = 0.2
    batch_size: int = 128
    seed: int = 0


def quiet_trainer(epochs: int, callbacks: Sequence[L.Callback], progress: bool = False) -> L.Trainer:
    """A Trainer on the CPU that logs and keeps nothing by itself."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


def pretrain(
    recipe: Pretraining, classes: int, train: SplitDataset, evaluation: SplitDataset, path: Path, progress: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Train the backbone on random crops, or take it where that is done; resumes where it was ended.

    Args:
        recipe: How.
        classes: Of `train`.
        train: Images of `CROPPED_FROM` pixels.
        evaluation: Held-out images of `IMAGE_SIZE` pixels.
        path: Folder for the weights.
        progress: Show a progress bar.

    Returns:
        The file of the weights, without the head, and the metrics: ``held_out`` by epoch and ``seconds``.

    Raises:
        InputError: `path` holds the weights of another recipe.
    """
    from safetensors.torch import save_file

    from experiments.demo_runs import quiet

    folder = RunFolder(path, {"model": MODEL, **asdict(recipe)})
    weights = path / "backbone.safetensors"
    metrics = folder.result()
    if metrics is not None and weights.is_file():
        return weights, metrics
    folder.start()
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    module = ImageClassifier(
        MODEL,
        classes,
        IMAGE_SIZE,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_epochs=recipe.epochs / 20,
    )
    data = TransferData(train, recipe.batch_size, recipe.seed, crop_to=IMAGE_SIZE)
    every = max(1, recipe.epochs // 8)
    looks = HeldOut(evaluation, {*range(every, recipe.epochs, every), recipe.epochs})
    clock = _Clock()
    checkpoints = ModelCheckpoint(folder.checkpoints, "last", every_n_epochs=every, enable_version_counter=False)
    with quiet():
        trainer = quiet_trainer(recipe.epochs, [looks, clock, checkpoints], progress)
        trainer.fit(module, datamodule=data, ckpt_path=folder.last_checkpoint())
    head = module.head_name.removeprefix("model.")
    state = {name: value for name, value in module.model.state_dict().items() if not name.startswith(f"{head}.")}
    temporary = weights.with_suffix(".part")
    save_file(state, temporary)
    temporary.replace(weights)
    metrics = {"held_out": looks.rows, "seconds": clock.seconds, "images": len(train), "classes": classes}
    folder.finish(metrics)
    (folder.checkpoints / "last.ckpt").unlink(missing_ok=True)
    return weights, metrics


class _Clock(L.Callback):
    """Processor seconds of training, also over interruptions."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.process_time()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += time.process_time() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
