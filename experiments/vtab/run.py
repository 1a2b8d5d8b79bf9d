"""One run: fine-tune a timm model on a VTAB-1K task by one method, and test it. Its settings: ``settings.py``."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from matplotlib.figure import Figure
from safetensors.torch import save_file

from eva_lightning import plots
from eva_lightning.adapters import save_pretrained
from eva_lightning.adapters.adalora import is_adalora
from eva_lightning.checkpoint_io import AtomicCheckpointIO
from eva_lightning.files import replacing, writable_folder
from eva_lightning.methods.apply import apply_method
from eva_lightning.methods.registry import METHODS
from eva_lightning.state import EVAState
from eva_lightning.vision.backbone.fused_adapter import save_fused_adapter
from eva_lightning.vision.backbone.split_fused import swiglu_layers
from eva_lightning.vision.data.datamodule import VTAB1K, LabelledImages
from eva_lightning.vision.data.folder import folder_loader
from eva_lightning.vision.decomposition import decompose
from eva_lightning.vision.epoch_csv import EpochHistory
from eva_lightning.vision.merged_evaluation import merged_in_fp32
from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.protocol import OnePassPCA, module_options
from experiments.runner.gradient_norms import gradient_norms
from experiments.runner.lightning_runs import (
    Divergence,
    check_devices,
    eva_metrics,
    eva_state,
    fit,
    on_gpu,
    trainer_precision,
)
from experiments.runner.loggers import open_loggers, parse_loggers
from experiments.runner.one_machine import one_machine
from experiments.runner.run_folder import RunFolder, Work, is_follower
from experiments.runner.run_logging import RunLogging
from experiments.runner.settings import Role, identity, plain
from experiments.vtab.checkpoints import EpochCheckpoints
from experiments.vtab.settings import Settings, headline
from experiments.vtab.weights import obtain_weights

_LOGGER = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a run is made of."""

    data: LabelledImages
    module: ImageClassifier
    callbacks: list[L.Callback]

    @property
    def eva_state(self) -> EVAState | None:
        """What EVA started from, once it has."""
        return eva_state(self.callbacks)


def build(settings: Settings) -> Work:
    """Check and build everything; what it returns trains and tests in a run folder, and gives the metrics.

    Raises:
        MissingInputError: Something of the data, or the weight file, is missing.
        InputError: A setting or the data is wrong.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    parts = assemble(settings)
    return lambda folder: train_and_test(settings, parts, folder)


def assemble(settings: Settings, data: LabelledImages | None = None) -> Parts:
    """Data, module and the method's callbacks, in this order of checks: nothing is built for a wrong name.

    Args:
        settings: What is asked for.
        data: Images instead of those of the settings' task.

    Raises:
        MissingInputError, InputError, UnreachableError: As :func:`build`.
    """
    check_devices(settings.devices, settings.accelerator)
    options = settings.adapter_options()
    weights = obtain_weights(settings.model, settings.weights)
    data = data or _data(settings, settings.split)
    rules = settings.rules
    rules.batches_per_epoch(len(data.data.train), settings.batch)
    L.seed_everything(settings.seed, workers=True, verbose=False)
    module = ImageClassifier(
        settings.model,
        data.num_classes,
        settings.image_size,
        weights,
        lr=settings.peak_lr,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        position_embedding=settings.pos_embed,  # type: ignore[arg-type]
        **module_options(rules),
    )
    if rules.decomposition is not None and settings.key.state_kind == "major" and settings.eva_state is None:
        options = replace(options, state=_decompose(settings, module, rules.decomposition))
    if settings.knowledge is not None and settings.method == "corda-kpm":
        options = replace(options, knowledge=_knowledge(settings, settings.knowledge))
    exclude = left_out(settings, module)
    callbacks = apply_method(settings.method, module, options, head=module.head_name, exclude=exclude)
    return Parts(data, module, callbacks)


def left_out(settings: Settings, module: ImageClassifier) -> list[str] | None:
    """Layers that get no adapter by the protocol, whatever else; None for the usual choice of layers."""
    rules, method = settings.rules, settings.method
    if settings.target_modules is not None:
        return None
    names = list(rules.exclude.get(method, ()))
    if method in rules.without_swiglu:
        names += swiglu_layers(module)
    return names or None


def _data(settings: Settings, split: str) -> VTAB1K:
    return VTAB1K(
        settings.root,
        settings.task,
        split=split,
        image_size=settings.image_size,
        batch_size=settings.batch // settings.accumulate,
        normalization=settings.normalization,
        workers=settings.workers,
        cache_dir=settings.cache_dir,
        limit_train=settings.limit_train,
        limit_test=settings.limit_test,
        seed=settings.seed,
        progress=settings.progress,
    )


def _knowledge(settings: Settings, folder: str) -> Any:
    size = settings.batch // settings.accumulate
    return folder_loader(folder, settings.image_size, size, normalization=settings.normalization, seed=settings.seed)


def _decompose(settings: Settings, module: ImageClassifier, options: OnePassPCA) -> EVAState:
    data = _data(settings, options.split)
    data.setup("fit")
    images: Any = data.train_dataloader().dataset
    progress = settings.progress and sys.stdout.isatty()
    device = "cuda" if on_gpu(settings.accelerator) else "cpu"
    return decompose(module, images, options, target_modules=settings.target_modules, device=device, progress=progress)


def train_and_test(
    settings: Settings, parts: Parts, folder: RunFolder, history: EpochHistory | None = None
) -> dict[str, Any]:
    """Train and test, from the last checkpoint in `folder` where there is one; `history` notes the epochs.

    Returns:
        The metrics, for ``metrics.json``.
    """
    data, checked = parts.data, parts.data.data
    _LOGGER.info(
        "%s: %d training images, %d evaluation images (%s), %d classes",
        settings.task, len(checked.train), len(checked.evaluation), checked.evaluation.name, data.num_classes,
    )  # fmt: skip
    not_followed = (f"not followed: {sentence}" for sentence in settings.rules.not_followed)
    for sentence in (*settings.explanation(settings.method), *not_followed):
        _LOGGER.info("%s", sentence)
    adapter = f"-r{settings.rank}" if settings.key.adapts else ""
    group = f"{settings.task}-{settings.model}-{settings.method}{adapter}-lr{settings.lr:g}"
    tags = (settings.task, settings.model, settings.method, settings.split)
    names = () if is_follower() else parse_loggers(settings.logger)
    with open_loggers(names, folder.path, settings.run_name, plain(settings), group=group, tags=tags) as loggers:
        history = history or EpochHistory(folder.path / "metrics.csv")
        checkpoints = EpochCheckpoints(folder.checkpoints, settings.checkpoint_minutes)
        divergence = Divergence()
        norms = gradient_norms(settings.gradient_norms, folder)
        callbacks = [*parts.callbacks, RunLogging(), history, divergence, *norms, checkpoints]
        trainer = _trainer(settings, data, callbacks, loggers)
        checkpoint = folder.last_checkpoint()
        fit(trainer, parts.module, data, checkpoint, lambda: f"{len(history.rows)} of {settings.epochs} epochs")
        diverged = divergence.metrics(trainer, parts.module)
        started = time.perf_counter()
        # weights that are NaN cannot be merged
        merged = settings.rules.merged_evaluation and not diverged
        tested, precision = _test(settings, parts, trainer, merged)
    metrics = {
        **_metrics(settings, parts),
        "train_seconds": sum(row["seconds"] for row in history.rows),
        "accuracy": tested["test_accuracy"],
        "loss": tested["test_loss"],
        "evaluation_seconds": time.perf_counter() - started,
        "precision": trainer.precision,
        "evaluation_precision": precision,
        "device": str(trainer.strategy.root_device),
        **diverged,
    }
    if is_follower():
        return metrics
    if settings.save_adapter and not diverged:
        _save_adapter(settings, parts, folder.path)
    if settings.plots:
        for name, figure in _figures(settings, parts, history).items():
            plots.save(figure, folder.plots / f"{name}.png", dpi=120)
    _LOGGER.info("%s -> %s", headline(metrics), folder.path)
    return metrics


def _trainer(settings: Settings, data: LabelledImages, callbacks: list[L.Callback], loggers: list[Logger]) -> L.Trainer:
    rules, batches = settings.rules, 1.0
    if rules.drop_last:
        batches = rules.batches_per_epoch(len(data.data.train), settings.batch) * settings.accumulate
    return L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        plugins=[AtomicCheckpointIO(), *one_machine(settings.devices)],
        precision=trainer_precision(settings.precision, settings.accelerator),  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        limit_train_batches=batches,
        limit_val_batches=1.0 if data.validates and settings.validate else 0,
        accumulate_grad_batches=settings.accumulate,
        callbacks=callbacks,
        logger=loggers or False,
        log_every_n_steps=1,  # means of epochs are logged; a larger one is warned of where epochs are shorter
        enable_progress_bar=settings.progress and sys.stdout.isatty(),
        enable_model_summary=False,
    )


def _test(settings: Settings, parts: Parts, trainer: L.Trainer, merged: bool) -> tuple[dict[str, float], str]:
    """Loss and accuracy of the evaluation split, and the precision they were computed in."""
    if not merged:
        tested = trainer.test(parts.module, datamodule=parts.data, verbose=False)[0]
        return dict(tested), str(trainer.precision)
    tester = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        plugins=one_machine(settings.devices),  # type: ignore[arg-type]
        precision="32-true",
        callbacks=[RunLogging()],
        logger=trainer.loggers or False,
        enable_progress_bar=trainer.progress_bar_callback is not None,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with merged_in_fp32(parts.module):
        return dict(tester.test(parts.module, datamodule=parts.data, verbose=False)[0]), str(tester.precision)


def _metrics(settings: Settings, parts: Parts) -> dict[str, Any]:
    """What can be said of a run besides its result; ``experiment`` is what runs of one table agree in."""
    checked, parameters = parts.data.data, list(parts.module.parameters())
    named = ("task", "model", "weights", "protocol", "pos_embed", "method", "lr", "seed", "epochs", "image_size")
    metrics: dict[str, Any] = {
        **{name: getattr(settings, name) for name in named},
        "experiment": experiment(settings),
        "group": checked.task.group,
        "split_fused": settings.rules.split_fused,
        "train_split": checked.train.name,
        "evaluation_split": checked.evaluation.name,
        "train_images": len(checked.train),
        "evaluation_images": len(checked.evaluation),
        "limited": checked.limited,
        "official_sizes": checked.comparable,
        "warnings": list(checked.warnings),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "torch": torch.__version__,
    }
    if settings.key.adapts:
        metrics["rank"] = settings.rank
    if settings.key.rho is not None:
        metrics["rho"] = settings.rho
    if settings.eva_state is not None:
        metrics["eva_state"] = Path(settings.eva_state).name
    return metrics | eva_metrics(parts.callbacks)


def experiment(settings: Settings) -> dict[str, Any]:
    """The settings that all runs of an experiment share, whatever task, method, grid and seed."""
    return identity(settings, Role.RESULT, without=Role.PER_RUN)


def _save_adapter(settings: Settings, parts: Parts, folder: Path) -> None:
    if settings.rules.dora_by_column and METHODS[settings.method].fixed.get("use_dora"):
        # stock PEFT has no such DoRA: whole layers, 4 GB of a ViT-g, would be its only form
        trained = {name: p.detach() for name, p in parts.module.named_parameters() if p.requires_grad}
        with replacing(writable_folder(folder / "adapter") / "trained.safetensors") as temporary:
            save_file(trained, temporary)
    elif settings.key.adapts:
        save_pretrained(parts.module.model, folder / "adapter")
        if settings.rules.split_fused and not is_adalora(parts.module.model):
            save_fused_adapter(parts.module.model, folder / "adapter" / "fused")
    if parts.eva_state is not None:
        parts.eva_state.without_components().save(folder / "eva_state")


def _figures(settings: Settings, parts: Parts, history: EpochHistory) -> dict[str, Figure]:
    limited = " (limited data)" if parts.data.data.limited else ""
    title = f"{settings.task}, {settings.model}, {settings.method}{limited}"
    figures = {}
    for kind, label in (("loss", "cross-entropy (nats)"), ("accuracy", "accuracy")):
        curves = {
            stage: np.array([[row[f"{stage}_{kind}"] for row in history.rows]])
            for stage in ("train", "val")
            if history.rows and all(f"{stage}_{kind}" in row for row in history.rows)
        }
        figures[kind] = plots.learning_curves(curves, label, title=title, percent=kind == "accuracy")
    state = parts.eva_state
    if state is not None:
        figures["ranks"] = plots.rank_heatmap(state.ranks, uniform_rank=settings.rank, title=f"ranks: {title}")
        ratios = {layer: ratio.tolist() for layer, ratio in state.explained_variance_ratio.items()}
        figures["spectra"] = plots.spectra(ratios, title=f"explained variance: {title}")
        if any(len(curve) > 1 for curve in state.convergence.values()):
            figures["convergence"] = plots.convergence(state.convergence, tau=settings.tau, title=title)
    return figures
