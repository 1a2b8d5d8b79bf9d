"""One training on one's own images, and what comes out of it. Its settings: ``settings.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from scipy.stats import binomtest
from torch import Tensor

from eva_lightning.adapters import save_pretrained
from eva_lightning.adapters.model_card import timm_line
from eva_lightning.vision.data.image_folder import ImageFolderDataModule
from eva_lightning.vision.epoch_csv import EpochHistory
from eva_lightning.vision.timm_export import save_timm, timm_name
from experiments.finetune.outcome import ADAPTER, MERGED, PAGE
from experiments.finetune.page import write_report
from experiments.finetune.settings import OneRun
from experiments.runner.jobs import Job
from experiments.runner.run_folder import RunFolder, Work
from experiments.vtab.run import Parts, assemble, train_and_test
from experiments.vtab.settings import weights_in_words
from experiments.vtab.weights import obtain_weights


class Predictions(L.Callback):
    """The classes that a test found, in the order of the images.

    Attributes:
        found: One label per image.
        confidence: Its probability.
    """

    def __init__(self) -> None:
        self.found: list[int] = []
        self.confidence: list[float] = []

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin."""
        self.found, self.confidence = [], []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the logits that the test step gives."""
        logits: Tensor = outputs
        best = logits.softmax(dim=1).max(dim=1)
        self.found += best.indices.tolist()
        self.confidence += [round(float(value), 4) for value in best.values]


def build_job(job: Job) -> Work:
    """The work of a tuning run."""
    return build(job.settings)


def build(run: OneRun, tuning: Sequence[dict[str, float]] = ()) -> Work:
    """Check and build everything; what it returns trains, tests and, of test images, writes the results.

    Raises:
        MissingInputError: Something of the data, or the weight file, is missing.
        InputError: A setting or the data is wrong.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    data = ImageFolderDataModule(
        run.data,
        split_file=run.split_file,
        test_share=run.test_share,
        val_share=run.val_share,
        split_seed=run.split_seed,
        hold_out=run.hold_out,
        evaluation=run.evaluation,
        image_size=run.image_size,
        batch_size=run.batch_size,
        workers=run.workers,
        cache_dir=run.cache_dir,
        seed=run.seed,
        progress=run.progress,
    )
    settings = run.as_vtab(data.data.task.name)
    parts = assemble(settings, data)
    predictions = Predictions()
    parts.callbacks.append(predictions)

    def work(folder: RunFolder) -> dict[str, Any]:
        data.check_images()
        history = EpochHistory(folder.path / "metrics.csv")
        metrics = train_and_test(settings, parts, folder, history)
        if run.evaluation != "test" or metrics.get("diverged"):
            return metrics
        metrics |= _tested(data, predictions)
        metrics |= {"tuning": list(tuning), "base_code": _base_code(run, parts)}
        _save(run, parts, data, metrics, folder.path)
        write_report(folder.path / PAGE, run, data, metrics, history.rows)
        return metrics

    return work


def _tested(data: ImageFolderDataModule, predictions: Predictions) -> dict[str, Any]:
    """What the test images say: labels found, the share that is right, and its interval."""
    truth = data.data.evaluation.labels
    right = sum(found == label for found, label in zip(predictions.found, truth, strict=True))
    interval = binomtest(right, len(truth)).proportion_ci(method="wilson")
    return {
        "accuracy": right / len(truth),
        "interval": [float(interval.low), float(interval.high)],
        "predicted": predictions.found,
        "confidence": predictions.confidence,
        "classes": list(data.class_names),
    }


def _base_code(run: OneRun, parts: Parts) -> str:
    """The line that builds what the adapter is loaded into; empty where there is no adapter, or weights are random."""
    if not run.key.adapts or run.weights == "none":
        return ""
    name = timm_name(parts.module)
    file = None if run.weights == "pretrained" else obtain_weights(run.model, run.weights).file
    return timm_line(parts.module.model, name if file is None else name.partition(".")[0], file)


def _save(run: OneRun, parts: Parts, data: ImageFolderDataModule, metrics: dict[str, Any], folder: Path) -> None:
    """The adapter, what EVA found, and the merged model."""
    checked = data.data
    low, high = metrics["interval"]
    about = {
        "learning rate": run.lr,
        "epochs": run.epochs,
        "data": f"{checked.task.name}: {len(checked.train)} images to train, {len(data.class_names)} classes",
        "accuracy": f"{metrics['accuracy']:.1%} of {len(checked.evaluation)} test images "
        f"(95% interval {low:.1%} to {high:.1%})",
        "weights": weights_in_words(run.weights),
        "classes": list(data.class_names),
    }
    if run.key.adapts:
        name = timm_name(parts.module)
        base = f"timm/{name}" if run.weights == "pretrained" else name.partition(".")[0]
        save_pretrained(parts.module.model, folder / ADAPTER, base_model=base, about=about)
    if parts.eva_state is not None:
        parts.eva_state.without_components().save(folder / "eva_state")
    save_timm(parts.module, folder / MERGED, data.class_names, about=about)
