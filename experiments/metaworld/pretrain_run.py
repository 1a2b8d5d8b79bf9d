"""One pre-training from beginning to end: data, network, training with rollouts on the way, weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from eva_lightning.rl.demonstrations import DemonstrationIndex, read_index
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.protocol import get_protocol
from eva_lightning.rl.rollout_callback import RolloutCallback
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments.metaworld.history import StepHistory
from experiments.metaworld.pretrain import Settings
from experiments.metaworld.training import fit, log_differences, make_trainer
from experiments.runner.lightning_runs import Divergence, check_devices, trainer_precision
from experiments.runner.loggers import check_loggers, open_loggers, parse_loggers
from experiments.runner.run_folder import RunFolder, Work, is_follower, perform_or_report
from experiments.runner.settings import plain

_LOGGER = logging.getLogger(__name__)

#: Settings that are arguments of the module.
_MODULE = (
    "width", "layers", "heads", "context", "dropout", "positions", "lr", "weight_decay", "warmup_steps", "min_lr",
    "gradient_clip",
)  # fmt: skip


def run(settings: Settings) -> dict[str, Any]:
    """The metrics of the run; a finished one is reported, an interrupted one resumed."""
    folder = RunFolder.below(settings.output, settings.run_name, settings)
    return perform_or_report(folder, partial(build, settings), headline, settings.overwrite)


def build(settings: Settings) -> Work:
    """Load and prepare everything, refusing what is wrong; nothing is written but the data's cache.

    Returns:
        The work to do in the run's folder, a function that returns the metrics.
    """
    check_devices(settings.devices, settings.accelerator)
    check_loggers(parse_loggers(settings.logger))
    index = read_index(settings.data)
    for task in {*settings.tasks, *(settings.rollout_tasks or ())}:
        index[task]  # says what is missing
    data = TrajectoryDataModule(
        settings.data,
        settings.tasks,
        context=settings.context,
        batch_size=settings.batch_size,
        episodes=settings.episodes,
        val_episodes=settings.val_episodes,
        seed=settings.seed,
        workers=settings.workers,
        cache_dir=settings.cache,
        dtype=settings.dtype,
        drop_previous_frame=settings.drop_previous_frame,
        target=settings.target,
    )
    L.seed_everything(settings.seed, workers=True, verbose=False)
    sizes: dict[str, Any] = {name: getattr(settings, name) for name in _MODULE}
    protocol = get_protocol(settings.protocol)
    module = DecisionTransformerModule(**protocol.state_statistics(data.statistics), **protocol.module_options, **sizes)
    if settings.compile:
        module.model.compile()

    def work(folder: RunFolder) -> dict[str, Any]:
        names = () if is_follower() else parse_loggers(settings.logger)
        with open_loggers(names, folder.path, settings.run_name, plain(settings)) as loggers:
            _LOGGER.info(
                "%d tasks, %d training windows of %d steps, %.2fM parameters",
                len(data.tasks),
                len(data.train_dataloader().dataset),  # type: ignore[arg-type]
                settings.context,
                sum(p.numel() for p in module.parameters()) / 1e6,
            )
            log_differences(protocol)
            metrics = _train(settings, folder, index, data, module, loggers)
            if is_follower():
                return metrics
            _save(settings, folder, data, module, metrics)
            _LOGGER.info("%s -> %s", headline(metrics), folder.path)
        return metrics

    return work


def _train(
    settings: Settings,
    folder: RunFolder,
    index: DemonstrationIndex,
    data: TrajectoryDataModule,
    module: DecisionTransformerModule,
    loggers: list[Logger],
) -> dict[str, Any]:
    history = StepHistory(folder.path / "metrics.csv", module.model.training_flops(settings.batch_size))
    validates, divergence = settings.val_episodes > 0, Divergence()
    trainer = make_trainer(
        folder,
        max_steps=settings.max_steps,
        checkpoint_every=settings.checkpoint_every,
        progress=settings.progress,
        callbacks=[*_rollouts(settings, index), history, divergence],
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=trainer_precision(settings.precision, settings.accelerator),
        val_check_interval=settings.val_every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validates else 0,
        logger=loggers or False,
        log_every_n_steps=min(50, settings.max_steps),
    )
    fit(trainer, module, data, folder)
    diverged = divergence.metrics(trainer, module)
    losses = dict(trainer.validate(module, datamodule=data, verbose=False)[0]) if validates else {}
    return {
        "tasks": list(data.tasks),
        "steps": trainer.global_step,
        "seed": settings.seed,
        "protocol": settings.protocol,
        "parameters": sum(p.numel() for p in module.parameters()),
        "train_loss": history.train_loss,
        "val_loss": losses.pop("val_loss", None),
        **losses,
        "train_seconds": history.seconds,
        "updates_per_second": history.updates_per_second,
        "model_flop_utilisation": history.utilisation,
        "peak_flops": history.peak,
        "flops_per_update": history.flops,
        "precision": trainer.precision,
        "device": history.device,
        "torch": torch.__version__,
        **diverged,
    }


def _rollouts(settings: Settings, index: DemonstrationIndex) -> list[L.Callback]:
    if settings.rollout_every == 0:
        return []
    tasks = settings.rollout_tasks or settings.tasks
    callback = RolloutCallback(
        tasks,
        episodes=settings.rollout_episodes,
        every_n_steps=settings.rollout_every,
        target_returns={task: index[task].max_return for task in tasks},
        video=settings.rollout_video,
    )
    return [callback]


def _save(
    settings: Settings,
    folder: RunFolder,
    data: TrajectoryDataModule,
    module: DecisionTransformerModule,
    metrics: Mapping[str, Any],
) -> None:
    about = {"tasks": list(data.tasks), "max_return": data.max_return, "mean_return": data.mean_return}
    about |= {key: metrics[key] for key in ("steps", "val_loss", "seed", "protocol")}
    save_weights(module, folder.path / "weights.ckpt", about=about)
    if settings.export is not None:
        save_weights(module, settings.export, torch.float16, about)


def headline(metrics: Mapping[str, Any]) -> str:
    """One line on one run."""
    loss = "" if metrics["val_loss"] is None else f"validation loss {metrics['val_loss']:.4f} after "
    share = f"{metrics['model_flop_utilisation']:.0%} model FLOP utilisation"
    speed = f"{metrics['updates_per_second']:.2f} steps/s"
    return f"{len(metrics['tasks'])} tasks, {loss}{metrics['steps']:,} steps, {speed}, {share}"
