"""Fine-tune a timm model on one VTAB-1K task and test it: ``python -m experiments.vtab --root DIR --task caltech101``.

The defaults are the protocol of the EVA paper (section D.2): 224x224 bicubic, ImageNet normalisation, no augmentation,
AdamW with weight decay 0.05, 30 epochs, linear warm-up over 3 and cosine decay, batch 64, a linear head on [CLS];
trained are head, LoRA matrices and biases; 1,000 training images, accuracy on the test set after the last epoch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, unknown
from eva_lightning.methods.keys import METHOD_TRAITS
from eva_lightning.vision.data.splits import PROTOCOLS, open_task
from eva_lightning.vision.protocol import Protocol, get_protocol, module_options
from experiments.runner.cli import in_terminal
from experiments.runner.loggers import LOGGER_HELP, check_loggers, open_loggers, parse_loggers
from experiments.runner.run_folder import RunFolder
from experiments.runner.settings import option, parse_settings

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure

    from eva_lightning.methods.vision import AdapterOptions
    from eva_lightning.state import EVAState
    from eva_lightning.vision.data.datamodule import VTAB1K
    from eva_lightning.vision.epoch_csv import EpochHistory
    from eva_lightning.vision.module import ImageClassifier
    from eva_lightning.vision.protocol import OnePassPCA

METHODS = tuple(METHOD_TRAITS)
POSITION_EMBEDDINGS = ("official", "timm")
PIXEL_NORMALIZATIONS = ("imagenet", "none")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed")

#: Settings that say where and how fast a run happens, not what comes out.
INCIDENTAL = ("root", "output", "name", "overwrite", "workers", "accelerator", "devices", "cache", "logger", "progress")


@dataclass(frozen=True)
class Outputs:
    """What a run says and leaves besides its metrics; none of it changes them. The defaults are those of a single run.

    Attributes:
        terminal: Say on the terminal what happens.
        validate: Note accuracy and loss of val200 after every epoch, where the run is tuned on it.
        plots: Draw the curves.
        adapter: Keep the trained adapter.
        checkpoint_minutes: Least time between checkpoints to resume from; 0: one after every epoch.
    """

    terminal: bool = True
    validate: bool = True
    plots: bool = True
    adapter: bool = True
    checkpoint_minutes: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Everything one run is asked to do; also the layout of ``config.yaml``."""

    root: str = option(MISSING, "folder that holds the VTAB-1K task folders")
    task: str = option(MISSING, "task, such as caltech101")
    model: str = option("dinov2_g14", "timm name, or dinov2_s14, dinov2_b14, dinov2_l14, dinov2_g14")
    weights: str = option("pretrained", "pretrained (Hugging Face hub), none (random), or a weight file")
    pos_embed: str = option("official", "resampling of DINOv2's position embedding: official (its own code) or timm")
    split_fused: bool = option(False, "adapt q, k, v and the two halves of SwiGLU separately")
    protocol: str = option("paper", "paper (its text), or authors-code (what their released pipeline does differently)")
    method: str = option("eva", ", ".join(METHODS))
    rank: int = option(16, "LoRA rank; EVA's mean rank per layer")
    rho: float = option(2.0, "EVA: largest rank over mean rank, at least 1 (1 keeps ranks uniform)")
    alpha: float = option(1.0, "LoRA's alpha; updates are scaled by alpha / rank")
    bias: str = option("all", "biases to train with adapters: all, lora_only or none")
    init: str = option("eva", "EVA: eva, whiten, rotate, permute, minor or redistribute")
    metric: str = option("ratio", "EVA: ratio, eq6, sum, max or raw explained variance")
    tau: float = option(0.99, "EVA: convergence threshold, in (0, 1]")
    delta: float = option(1.0, "EVA: share of the layers that must have converged, in (0, 1]")
    lora_plus_ratio: float = option(16.0, "LoRA+: learning rate of B over that of A")
    max_batches: int | None = option(None, "EVA, CorDA and LoRA-GA: most minibatches to look at before training")
    eva_state: str | None = option(None, "EVA: file of a saved state to start from, instead of streaming")
    epochs: int = option(30, "training epochs")
    warmup_epochs: float = option(3.0, "epochs of linear warm-up")
    lr: float = option(1e-3, "peak learning rate (the paper searches 2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4)")
    weight_decay: float = option(0.05, "AdamW's weight decay")
    dropout: float = option(0.0, "dropout on the adapters' inputs")
    batch_size: int = option(64, "images per optimizer step")
    accumulate: int = option(1, "split a batch into this many passes, for small memories")
    split: str = option("train800val200", "train800val200 (tested on test) or train800 (on val200, for tuning)")
    image_size: int = option(224, "height and width of the images, in pixels")
    normalization: str = option("imagenet", "imagenet or none")
    seed: int = option(0, "seed of head, data order and EVA's random parts")
    limit_train: int | None = option(None, "use only the first so many training images; marked in the metrics")
    limit_test: int | None = option(None, "use only the first so many test images; marked in the metrics")
    precision: str = option("auto", "auto (bf16-mixed on a GPU, else 32-true), or a Lightning precision")
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...")
    devices: int = option(1, "number of devices")
    workers: int = option(0, "image decoding threads")
    cache: str | None = option(None, "folder for decoded images, or none; OUTPUT/cache if not given")
    logger: str = option("none", LOGGER_HELP)
    output: str = option("runs", "folder that holds the runs")
    name: str | None = option(None, "name of the run's folder; made of task, model, method, lr and seed if not given")
    overwrite: bool = option(False, "delete a run of this name first; without it, runs are resumed or reprinted")
    progress: bool = option(True, "show progress bars")

    def __post_init__(self) -> None:
        for kind, value, choices in (
            ("method", self.method, METHODS),
            ("precision", self.precision, PRECISIONS),
            ("pos_embed", self.pos_embed, POSITION_EMBEDDINGS),
            ("normalization", self.normalization, PIXEL_NORMALIZATIONS),
            ("training split", self.split, tuple(PROTOCOLS)),
        ):
            if value not in choices:
                raise InputError(unknown(kind, value, choices))
        for name in ("epochs", "batch_size", "accumulate", "image_size", "devices", "rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "warmup_epochs", "workers"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate must divide batch_size {self.batch_size}, got {self.accumulate}")
        if self.name is not None and (not self.name.strip() or Path(self.name).name != self.name):
            raise InputError(f"name must be the plain name of a folder, got {self.name!r}")
        parse_loggers(self.logger)
        get_protocol(self.protocol)

    @property
    def adapts(self) -> bool:
        """Whether the method has adapters."""
        return METHOD_TRAITS[self.method].adapts

    @property
    def rules(self) -> Protocol:
        """What ``protocol`` and ``split_fused`` ask for."""
        protocol = get_protocol(self.protocol)
        return replace(protocol, split_fused=protocol.split_fused or self.split_fused)

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        if self.name is not None:
            return self.name
        adapter = f"-r{self.rank}" if self.adapts else ""
        adapter += f"-rho{self.rho:g}" if METHOD_TRAITS[self.method].redistributes else ""
        tuning = "-train800" if self.split == "train800" else ""
        model = self.model.replace("/", "_").replace(":", "_") + ("-split" if self.split_fused else "")
        protocol = "" if self.protocol == "paper" else f"-{self.protocol}"
        return f"{self.task}-{model}-{self.method}{adapter}-lr{self.lr:g}-seed{self.seed}{tuning}{protocol}"

    @property
    def cache_dir(self) -> Path | None:
        """Folder for decoded images, or None to do without."""
        if self.cache is None:
            return Path(self.output) / "cache"
        return None if self.cache == "none" else Path(self.cache)

    def adapter_options(self) -> AdapterOptions:
        """The settings that concern adapters."""
        from eva_lightning.methods.vision import AdapterOptions

        rules, own = self.rules, ("state", "rho", "rescale_alpha")
        shared = {f.name: getattr(self, f.name) for f in fields(AdapterOptions) if f.name not in own}
        rho = self.rho
        if rules.decomposition is not None and METHOD_TRAITS[self.method].redistributes:
            rho = rules.decomposition.rho(self.rank, rho)
        return AdapterOptions(**shared, rho=rho, rescale_alpha=rules.rescale_alpha, state=self.eva_state)


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    return parse_settings(Settings, "python -m experiments.vtab", (__doc__ or "").splitlines()[0], args)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `args` (``sys.argv`` for None) and return what ``metrics.json`` holds.

    A finished run of the same settings is reported, not repeated; an interrupted one is resumed.

    Raises:
        MissingInputError: Something of the data, or the weight file, is missing.
        InputError: A setting or the data is wrong, or the folder holds a run of other settings.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    settings = parse(args)
    folder = RunFolder(Path(settings.output) / settings.run_name, asdict(settings), INCIDENTAL)
    if not settings.overwrite:
        result = folder.result()
        if result is not None:
            print(f"{folder.path} is finished already (--overwrite runs it again): {_headline(result)}")
            return result
    check_loggers(parse_loggers(settings.logger))
    # looked at before timm is imported; the data module below looks again
    open_task(settings.root, settings.task, settings.split, settings.limit_train, settings.limit_test)
    return execute(settings, folder)


def build(settings: Settings) -> tuple[VTAB1K, ImageClassifier, list[L.Callback]]:
    """Data, module and the method's callbacks of a run, in this order of checks: nothing is built for a wrong name.

    Raises:
        MissingInputError, InputError, UnreachableError: As :func:`main`.
    """
    import lightning as L

    from eva_lightning.methods.vision import apply_method
    from eva_lightning.vision.backbone.timm_models import resolve_model
    from eva_lightning.vision.backbone.weights import resolve_weights
    from eva_lightning.vision.module import ImageClassifier

    _check_devices(settings)
    options = settings.adapter_options()
    weights = resolve_weights(resolve_model(settings.model), settings.weights)
    data = _data(settings, settings.split)
    rules = settings.rules
    rules.batches_per_epoch(len(data.data.train), settings.batch_size)
    L.seed_everything(settings.seed, workers=True, verbose=False)
    module = ImageClassifier(
        settings.model,
        data.num_classes,
        settings.image_size,
        weights,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        position_embedding=settings.pos_embed,  # type: ignore[arg-type]
        **module_options(rules),
    )
    major = METHOD_TRAITS[settings.method].state_kind == "major"
    if rules.decomposition is not None and major and settings.eva_state is None:
        options = replace(options, state=_decompose(settings, module, rules.decomposition))
    return data, module, apply_method(settings.method, module, options)


def _data(settings: Settings, split: str) -> VTAB1K:
    from eva_lightning.vision.data.datamodule import VTAB1K

    return VTAB1K(
        settings.root,
        settings.task,
        split=split,
        image_size=settings.image_size,
        batch_size=settings.batch_size // settings.accumulate,
        normalization=settings.normalization,
        workers=settings.workers,
        cache_dir=settings.cache_dir,
        limit_train=settings.limit_train,
        limit_test=settings.limit_test,
        seed=settings.seed,
        progress=settings.progress,
    )


def _decompose(settings: Settings, module: ImageClassifier, options: OnePassPCA) -> EVAState:
    from eva_lightning.vision.decomposition import decompose

    data = _data(settings, options.split)
    data.setup("fit")
    images: Any = data.train_dataloader().dataset
    progress = settings.progress and sys.stdout.isatty()
    return decompose(module, images, options, device="cuda" if on_gpu(settings) else "cpu", progress=progress)


def execute(settings: Settings, folder: RunFolder, outputs: Outputs = Outputs()) -> dict[str, Any]:
    """Train and test as `settings` say, from the last checkpoint in `folder` where there is one.

    Returns:
        The metrics, which ``metrics.json`` in `folder` holds from then on.

    Raises:
        MissingInputError, InputError, UnreachableError: As :func:`main`.
    """
    import logging

    logger = logging.getLogger("experiments.vtab.run")
    data, module, callbacks = build(settings)
    for callback in callbacks:
        if not outputs.terminal and hasattr(callback, "verbose"):
            callback.verbose = False
    if settings.overwrite:
        folder.clear()
    folder.start()
    with folder.logging(outputs.terminal):
        logger.info(
            "%s: %d training images, %d evaluation images (%s), %d classes",
            settings.task,
            len(data.data.train),
            len(data.data.evaluation),
            data.data.evaluation.name,
            data.num_classes,
        )
        for sentence in data.data.warnings:
            logger.warning(sentence)
        with _open_loggers(settings, folder) as loggers:
            metrics = _train_and_test(settings, folder, outputs, data, module, callbacks, loggers)
        folder.finish(metrics)
        logger.info("%s -> %s", _headline(metrics), folder.path)
    return metrics


def _train_and_test(
    settings: Settings,
    folder: RunFolder,
    outputs: Outputs,
    data: VTAB1K,
    module: ImageClassifier,
    callbacks: list[L.Callback],
    loggers: list[Logger],
) -> dict[str, Any]:
    import logging

    import lightning as L

    from eva_lightning.vision.epoch_csv import EpochHistory
    from experiments.runner.run_logging import RunLogging
    from experiments.vtab.checkpoints import EpochCheckpoints

    history = EpochHistory(folder.path / "metrics.csv")
    checkpoints = EpochCheckpoints(folder.checkpoints / "last.ckpt", outputs.checkpoint_minutes)
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=lightning_precision(settings),  # type: ignore[arg-type]
        max_epochs=settings.epochs,
        limit_train_batches=_limit_train_batches(settings, data),
        limit_val_batches=1.0 if data.validates and outputs.validate else 0,
        accumulate_grad_batches=settings.accumulate,
        callbacks=[*callbacks, RunLogging(), history, checkpoints],
        logger=loggers or False,
        log_every_n_steps=1,  # means of epochs are logged; a larger one is warned of where epochs are shorter
        enable_progress_bar=settings.progress and outputs.terminal and sys.stdout.isatty(),
        enable_model_summary=False,
    )
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        logging.getLogger("experiments.vtab.run").info("resuming from %s", checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        # how Lightning ends on Ctrl-C
        logging.getLogger("experiments.vtab.run").warning(
            "interrupted after %d of %d epochs: the same command continues from there",
            len(history.rows),
            settings.epochs,
        )
        raise
    started = time.perf_counter()
    tested, evaluation_precision = _test(settings, trainer, module, data)
    metrics = _metrics(settings, data, module, callbacks, history)
    metrics["evaluation_precision"] = evaluation_precision
    metrics["accuracy"] = tested["test_accuracy"]
    metrics["loss"] = tested["test_loss"]
    metrics["evaluation_seconds"] = time.perf_counter() - started
    metrics["precision"] = trainer.precision
    metrics["device"] = str(trainer.strategy.root_device)
    _save_outputs(settings, folder, outputs, module, callbacks, history, metrics)
    return metrics


def _limit_train_batches(settings: Settings, data: VTAB1K) -> int | float:
    if not settings.rules.drop_last:
        return 1.0
    return settings.rules.batches_per_epoch(len(data.data.train), settings.batch_size) * settings.accumulate


def _test(
    settings: Settings, trainer: L.Trainer, module: ImageClassifier, data: VTAB1K
) -> tuple[Mapping[str, float], str]:
    """Loss and accuracy of the evaluation split, and the precision they were computed in."""
    import lightning as L

    from eva_lightning.vision.merged_evaluation import merged_in_fp32
    from experiments.runner.run_logging import RunLogging

    if not settings.rules.merged_evaluation:
        return trainer.test(module, datamodule=data, verbose=False)[0], str(trainer.precision)
    tester = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision="32-true",
        callbacks=[RunLogging()],
        logger=trainer.loggers or False,
        enable_progress_bar=trainer.progress_bar_callback is not None,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with merged_in_fp32(module):
        return tester.test(module, datamodule=data, verbose=False)[0], str(tester.precision)


def _open_loggers(settings: Settings, folder: RunFolder) -> AbstractContextManager[list[Logger]]:
    adapter = f"-r{settings.rank}" if settings.adapts else ""
    return open_loggers(
        parse_loggers(settings.logger),
        folder.path,
        settings.run_name,
        folder.config,
        group=f"{settings.task}-{settings.model}-{settings.method}{adapter}-lr{settings.lr:g}",
        tags=(settings.task, settings.model, settings.method, settings.split),
    )


def lightning_precision(settings: Settings) -> str:
    """The Trainer's precision: ``"auto"`` is bf16-mixed where there is a GPU that can, and fp32 elsewhere."""
    import torch

    if settings.precision != "auto":
        return settings.precision
    return "bf16-mixed" if on_gpu(settings) and torch.cuda.is_bf16_supported() else "32-true"


def _check_devices(settings: Settings) -> None:
    """Lightning starts as many processes as it is told to on a CPU, and they never end."""
    import torch

    there = torch.cuda.device_count() if on_gpu(settings) else os.cpu_count() or 1
    if settings.devices > there:
        kind = "GPUs" if on_gpu(settings) else "CPU cores"
        raise InputError(f"devices must be at most the {there} {kind} of this machine, got {settings.devices}")


def on_gpu(settings: Settings) -> bool:
    """Whether a CUDA device is wanted and there."""
    import torch

    return settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _metrics(
    settings: Settings, data: VTAB1K, module: ImageClassifier, callbacks: list[L.Callback], history: EpochHistory
) -> dict[str, Any]:
    import torch

    checked = data.data
    parameters = list(module.parameters())
    metrics: dict[str, Any] = {
        "task": settings.task,
        "group": checked.task.group,
        "model": settings.model,
        "weights": settings.weights,
        "protocol": settings.protocol,
        "split_fused": settings.rules.split_fused,
        "pos_embed": settings.pos_embed,
        "method": settings.method,
        "lr": settings.lr,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "image_size": settings.image_size,
        "train_split": checked.train.name,
        "evaluation_split": checked.evaluation.name,
        "train_images": len(checked.train),
        "evaluation_images": len(checked.evaluation),
        "limited": checked.limited,
        "official_sizes": checked.comparable,
        "warnings": list(checked.warnings),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "train_seconds": sum(row["seconds"] for row in history.rows),
        "torch": torch.__version__,
    }
    state = _eva_state(callbacks)
    if settings.adapts:
        metrics["rank"] = settings.rank
    if METHOD_TRAITS[settings.method].redistributes:
        metrics["rho"] = settings.rho
    if state is not None:
        metrics["init_seconds"] = state.seconds
        metrics["init_batches"] = state.n_batches
        metrics["ranks"] = dict(state.ranks)
    return metrics


def _eva_state(callbacks: list[L.Callback]) -> EVAState | None:
    from eva_lightning.callback import EVAInitCallback

    return next((callback.state for callback in callbacks if isinstance(callback, EVAInitCallback)), None)


def _save_outputs(
    settings: Settings,
    folder: RunFolder,
    outputs: Outputs,
    module: ImageClassifier,
    callbacks: list[L.Callback],
    history: EpochHistory,
    metrics: dict[str, Any],
) -> None:
    state = _eva_state(callbacks)
    if "rank" in metrics and outputs.adapter:
        from eva_lightning.adapters import save_pretrained
        from eva_lightning.adapters.adalora import is_adalora
        from eva_lightning.vision.backbone.fused_adapter import save_fused_adapter

        save_pretrained(module.model, folder.path / "adapter")
        if settings.rules.split_fused and not is_adalora(module.model):
            save_fused_adapter(module.model, folder.path / "adapter" / "fused")
    if state is not None and outputs.adapter:
        state.without_components().save(folder.path / "eva_state")
    if not outputs.plots:
        return
    title = f"{settings.task}, {settings.model}, {settings.method}" + (" (limited data)" if metrics["limited"] else "")
    folder.plots.mkdir(exist_ok=True)
    for name, figure in _figures(history, state, settings, title).items():
        figure.savefig(folder.plots / f"{name}.png", dpi=120)


def _figures(history: EpochHistory, state: EVAState | None, settings: Settings, title: str) -> dict[str, Figure]:
    import numpy as np

    from eva_lightning import plots

    figures = {}
    for kind, label in (("loss", "cross-entropy (nats)"), ("accuracy", "accuracy")):
        curves = {
            stage: np.array([[row[f"{stage}_{kind}"] for row in history.rows]])
            for stage in ("train", "val")
            if history.rows and all(f"{stage}_{kind}" in row for row in history.rows)
        }
        figures[kind] = plots.learning_curves(curves, label, title=title, percent=kind == "accuracy")
    if state is not None:
        figures["ranks"] = plots.rank_heatmap(state.ranks, uniform_rank=settings.rank, title=f"ranks: {title}")
        ratios = {layer: ratio.tolist() for layer, ratio in state.explained_variance_ratio.items()}
        figures["spectra"] = plots.spectra(ratios, title=f"explained variance: {title}")
        if any(len(curve) > 1 for curve in state.convergence.values()):
            figures["convergence"] = plots.convergence(state.convergence, tau=settings.tau, title=title)
    return figures


def _headline(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['task']} {metrics['evaluation_split']} accuracy {metrics['accuracy']:.2%} "
        f"({metrics['evaluation_images']} images{', limited' if metrics['limited'] else ''}), "
        f"{metrics['model']}, {metrics['method']}"
    )


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
