"""One run on photographs: fine-tune a pre-trained network, or read its frozen features with a linear classifier.

A run takes a minute, so an interrupted one starts over, and nothing but its metrics is kept.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from eva_lightning.gradient_norms import GradientNorms
from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.methods.registry import DEFAULT_RHO
from eva_lightning.vision.backbone.timm_models import resolve_model
from eva_lightning.vision.backbone.weights import resolve_weights
from eva_lightning.vision.data.datamodule import VTAB1K, SplitDataset
from eva_lightning.vision.module import ImageClassifier
from experiments.comparisons.held_out import Evaluations, FirstStep, StopAfter, logits_of, measured, quick_trainer
from experiments.comparisons.photographs_settings import OneRun
from experiments.comparisons.source_digest import source_digest
from experiments.report.ranks import described
from experiments.runner.jobs import Job
from experiments.runner.lightning_runs import Divergence, eva_state
from experiments.runner.run_folder import RunFolder, Work

PACKAGES = ("torch", "lightning", "peft", "timm", "scikit-learn")
#: Inverse strengths of the linear classifier's penalty, to choose from.
PENALTIES = tuple(10.0**power for power in range(-5, 3))


def code_of_runs() -> str:
    """Digest of what makes a run."""
    here = ("held_out", "photographs_run", "photographs_settings")
    sources = ["eva_lightning", *(f"experiments/comparisons/{name}.py" for name in here)]
    return source_digest(sources, ["eva_lightning/rl", "eva_lightning/vision/digits.py"], PACKAGES)


def build(job: Job) -> Work:
    """The work of a job whose settings are a :class:`OneRun`."""
    run: OneRun = job.settings
    return partial(probe if MethodKey.parse(run.method).entry.trains == "head" else finetune, run)


def finetune(run: OneRun, folder: RunFolder) -> dict[str, Any]:
    """Fine-tune; returns held-out values by epoch. ``setup_seconds`` is the time until the first training step."""
    data = images_of(run, run.evaluate_on)
    L.seed_everything(run.seed, verbose=False)
    module = classifier(run, data.num_classes)
    key, started = MethodKey.parse(run.method), time.perf_counter()
    options = AdapterOptions(rank=run.rank, rho=key.rho or DEFAULT_RHO, seed=run.seed)
    callbacks = apply_method(key.method, module, options, head=module.head_name)
    evaluations = Evaluations(evaluation_images(data), run.evaluated)
    first, divergence, norms = FirstStep(), Divergence(), GradientNorms(max(1, run.gradient_steps))
    notes = [norms] if run.gradient_steps else []
    trainer = quick_trainer(
        run.epochs, [first, divergence, *callbacks, *notes, evaluations, StopAfter(run.stop_after)], validate=False
    )
    trainer.fit(module, datamodule=data)
    state = eva_state(callbacks)
    return {
        "epochs": evaluations.curve("epoch"),
        "loss": evaluations.curve("loss"),
        "accuracy": evaluations.curve("accuracy"),
        "predicted": evaluations.predicted,
        "trainable_parameters": first.trainable_parameters,
        "setup_seconds": first.at - started,
        "gradients": norms.rows,
        "eva": {} if state is None else described(state),
        **divergence.metrics(trainer, module),
    }


def probe(run: OneRun, folder: RunFolder) -> dict[str, Any]:
    """Logistic regression on frozen features, to its end; the penalty is the one with the lowest loss on val200."""
    tuning, data = images_of(run, "val200"), images_of(run, run.evaluate_on)
    module = classifier(run, data.num_classes)
    trained = sum(p.numel() for p in module.get_submodule(module.head_name).parameters())
    model: Any = module.model
    model.reset_classifier(0)  # it now gives what the head would read
    tuning.setup("fit")
    train: Any = tuning.train_dataloader().dataset
    parts = [
        (logits_of(module, part).numpy(), part.labels) for part in (train, *map(evaluation_images, (tuning, data)))
    ]
    (x, y), (x_val, y_val), (x_test, y_test) = parts
    scaler = StandardScaler().fit(x)
    found = {}
    for penalty in PENALTIES:
        fitted = LogisticRegression(C=penalty, max_iter=2000).fit(scaler.transform(x), y)
        found[penalty] = (measured(_logits(fitted, scaler, x_val), y_val)["loss"], fitted)
    penalty = min(found, key=lambda penalty: found[penalty][0])
    logits = _logits(found[penalty][1], scaler, x_test)
    metrics = measured(logits, y_test)
    return {
        "epochs": [run.epochs],
        "loss": [metrics["loss"]],
        "accuracy": [metrics["accuracy"]],
        "predicted": logits.argmax(dim=1).tolist(),
        "trainable_parameters": trained,
        "penalty": penalty,
    }


def images_of(run: OneRun, split: str) -> VTAB1K:
    """Training images, and those of `split` to evaluate on."""
    return VTAB1K(
        run.root,
        run.task,
        split="train800",
        evaluation=split,
        image_size=run.image_size,
        batch_size=run.batch_size,
        limit_test=run.test_images if split == "test" else None,
        seed=run.seed,
        progress=False,
    )


def evaluation_images(data: VTAB1K) -> SplitDataset:
    """The images to evaluate on, in the order of their split."""
    data.setup("test")
    images: Any = data.test_dataloader().dataset
    return images


def classifier(run: OneRun, classes: int) -> ImageClassifier:
    """The pre-trained network with a new head."""
    return ImageClassifier(
        run.model,
        classes,
        run.image_size,
        resolve_weights(resolve_model(run.model), run.weights),
        lr=run.lr,
        weight_decay=run.weight_decay,
        warmup_epochs=run.warmup_epochs,
    )


def _logits(model: Any, scaler: Any, features: np.ndarray) -> Tensor:
    """Log-probabilities ``(n, classes)``."""
    return torch.from_numpy(model.predict_log_proba(scaler.transform(features))).float()
