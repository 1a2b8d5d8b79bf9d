"""The small Vision Transformer of the transfer comparison, and its pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, vit_tiny_patch16_224
from torch import nn

from eva_lightning.files import replacing
from eva_lightning.tensor_files import are_whole, write_tensors
from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.module import ImageClassifier
from experiments.comparisons.held_out import Evaluations, quick_trainer
from experiments.comparisons.transfer_data import TransferData
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
    trainer = quick_trainer(epochs, [evaluations, clock, checkpoints], progress)
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
