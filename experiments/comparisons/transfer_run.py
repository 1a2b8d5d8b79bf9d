"""One run of the transfer comparison: fine-tune on the second half of the classes, evaluate on held-out images.

A run takes seconds, so an interrupted one starts over, and nothing but its metrics is kept.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from eva_lightning.files import file_digest
from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.backbone.weights import Weights
from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.module import ImageClassifier
from experiments.comparisons.held_out import Evaluations, quick_trainer
from experiments.comparisons.transfer import NOT_PRETRAINED, Recipe
from experiments.comparisons.transfer_data import Halves, TransferData, decoded, read_images, split_halves
from experiments.comparisons.transfer_model import IMAGE_SIZE, MODEL
from experiments.runner.jobs import Job
from experiments.runner.lightning_runs import Divergence, eva_metrics
from experiments.runner.run_folder import RunFolder, Work
from experiments.runner.settings import Role, option


def _digest(weights: str) -> str | None:
    return file_digest(weights)[:16] if Path(weights).is_file() else None


@dataclass(frozen=True, kw_only=True)
class Run(Recipe):
    """Settings of one run; its ``config.yaml``."""

    method: str = option("lora", "key of the method", Role.RESULT | Role.PER_RUN)
    phase: str = option(
        "final", "tune: trained on 800 images, evaluated on 200; final: on 1,000, evaluated on the others",
        Role.RESULT | Role.PER_RUN,
    )  # fmt: skip
    lr: float = option(1e-3, "peak learning rate", Role.RESULT | Role.PER_RUN)
    seed: int = option(
        0, "of head, order of images and random parts of initialisations; not of the images", Role.RESULT | Role.PER_RUN
    )
    weights: str = option("", "file of the pre-trained weights", Role.RESULT, identity=_digest)
    cache: str = option("", "folder of decoded images", Role.PLACE)


@functools.lru_cache(maxsize=1)
def halves(root: str, seed: int, train: int, validation: int) -> Halves:
    """The images, listed once per process."""
    return split_halves(read_images(root), seed, train, validation)


@functools.lru_cache(maxsize=2)
def _images(
    phase: str, root: str, cache: str, seed: int, train: int, validation: int
) -> tuple[SplitDataset, SplitDataset, int]:
    """Images to train on, images to evaluate on, and the number of classes; decoded once, read once per process."""
    found = halves(root, seed, train, validation)
    first, second = (decoded(split, IMAGE_SIZE, Path(cache)) for split in found.of(phase))
    return first, second, found.classes[1]


def build(job: Job) -> Work:
    """The work of a job whose settings are a :class:`Run`.

    Its metrics: ``evaluations``, one mapping per evaluation (``epoch``, ``loss``, ``accuracy``, ``class_accuracy``),
    the last one after training; ``trainable_parameters``; ``seconds`` of the processor, evaluations included; for EVA
    ``ranks``, ``init_seconds`` and ``init_batches``.
    """
    run: Run = job.settings
    train, held_out, classes = _images(
        run.phase, run.root, run.cache, run.split_seed, run.train_images, run.validation_images
    )
    started = time.process_time()
    L.seed_everything(run.seed, workers=True, verbose=False)
    module = ImageClassifier(
        MODEL,
        classes,
        IMAGE_SIZE,
        None if run.method in NOT_PRETRAINED else Weights(pretrained=True, file=Path(run.weights), strict=True),
        lr=run.lr,
        weight_decay=run.weight_decay,
        warmup_epochs=run.warmup_epochs,
    )
    callbacks = prepare(module, run)

    def work(folder: RunFolder) -> dict[str, Any]:
        evaluations, divergence = Evaluations(held_out, run.eval_epochs), Divergence()
        trainer = quick_trainer(run.epochs, [*callbacks, evaluations, divergence])
        trainer.fit(module, datamodule=TransferData(train, run.batch_size, run.seed))
        return {
            "evaluations": evaluations.rows,
            "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "seconds": time.process_time() - started,
            **eva_metrics(callbacks),
            **divergence.metrics(trainer, module),
        }

    return work


def prepare(module: ImageClassifier, run: Run) -> list[L.Callback]:
    """Make `module` ready for a method; returns the callbacks to train with."""
    if run.method == "scratch":
        return []  # at one learning rate for all layers: there is no pre-training that lower layers should keep
    key = MethodKey.parse(run.method.removesuffix("-random"))
    options = AdapterOptions(rank=run.rank, alpha=run.alpha, rho=key.rho or 1.0, seed=run.seed)
    return apply_method(key.method, module, options, head=module.head_name)
