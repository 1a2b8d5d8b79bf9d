"""Pre-train a Decision Transformer: ``python -m experiments.metaworld pretrain --config configs/metaworld/...yaml``.

The defaults are the paper's (section E.2): 1M updates on MT40, batch 128, context 50, AdamW, 4,000 warm-up steps,
cosine decay from 1e-4 to 1e-6, clipping at 0.25, dropout 0.2, mixed precision where there is a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, unknown
from eva_lightning.rl.tasks import parse_tasks
from experiments.runner.cli import in_terminal
from experiments.runner.loggers import LOGGER_HELP, check_loggers, open_loggers, parse_loggers
from experiments.runner.run_folder import RunFolder
from experiments.runner.settings import option, parse_settings

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import Logger

    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.trajectories import TrajectoryDataModule
    from experiments.metaworld.history import StepHistory

PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed")

#: Settings that say where and how fast a run happens, not what comes out.
INCIDENTAL = (
    "data", "cache", "output", "name", "overwrite", "workers", "accelerator", "devices", "compile", "export", "logger",
    "progress", "checkpoint_every", "rollout_video",
)  # fmt: skip

#: Settings that are arguments of the module.
_MODULE = (
    "width", "layers", "heads", "context", "dropout", "positions", "lr", "weight_decay", "warmup_steps", "min_lr",
    "gradient_clip",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything one run is asked to do; also the layout of ``config.yaml``."""

    tasks: str = option("mt40", "mt40, cw10, or task names with commas between them")
    data: str = option("data/metaworld", "folder of demonstrations, made by the collect command")
    episodes: int | None = option(None, "training episodes per task; all but the held-out ones if not given")
    val_episodes: int = option(4, "held-out episodes per task, the last ones")
    target: str = option("executed", "actions to predict: executed (with noise) or expert (clean)")
    dtype: str = option("float32", "states and actions in the cache: float32 or float16")
    drop_previous_frame: bool = option(False, "leave the repeated frame out of the cache")
    width: int = option(512, "features of a token")
    layers: int = option(4, "number of blocks")
    heads: int = option(8, "attention heads")
    context: int = option(50, "steps of a window; a step is four tokens")
    dropout: float = option(0.2, "dropout on embeddings, attention weights and residual branches")
    positions: str = option("global", "global (place of the token in the window) or timestep (step of the episode)")
    max_steps: int = option(1_000_000, "updates")
    batch_size: int = option(128, "windows per update")
    lr: float = option(1e-4, "peak learning rate")
    min_lr: float = option(1e-6, "learning rate after the last update")
    warmup_steps: int = option(4000, "updates of linear warm-up; at most a tenth of all")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    gradient_clip: float | None = option(0.25, "largest norm of the gradient")
    val_every: int = option(1000, "updates between validations; a line of metrics.csv each")
    rollout_every: int = option(0, "updates between rollouts in the simulator; 0 for none")
    rollout_episodes: int = option(10, "episodes per task and rollout")
    rollout_tasks: str | None = option(None, "tasks to roll out; all trained ones if not given")
    rollout_video: int = option(0, "episodes per task and rollout to film; the logger takes the videos")
    checkpoint_every: int = option(1000, "updates between checkpoints, from which an interrupted run continues")
    seed: int = option(0, "seed of weights, dropout and windows")
    precision: str = option("auto", "auto (bf16-mixed on a GPU, else 32-true), or a Lightning precision")
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...")
    devices: int = option(1, "number of devices")
    workers: int = option(0, "loader processes; 0 is fastest here")
    compile: bool = option(False, "compile the network; takes a minute at the start")
    cache: str | None = option(None, "folder for memory-mapped data; DATA/cache if not given")
    export: str | None = option(None, "also write weights and hyper-parameters alone to this file, in float16")
    logger: str = option("none", LOGGER_HELP)
    output: str = option("runs", "folder that holds the runs")
    name: str | None = option(None, "name of the run's folder; made of tasks, sizes and seed if not given")
    overwrite: bool = option(False, "delete a run of this name first; without it, runs are resumed or reprinted")
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(unknown("precision", self.precision, PRECISIONS))
        parse_loggers(self.logger)
        for name in ("max_steps", "batch_size", "val_every", "checkpoint_every", "devices", "rollout_episodes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rollout_every", "rollout_video"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.rollout_video and self.logger == "none":
            raise InputError(
                "rollout_video needs a logger that takes videos: --logger tensorboard, wandb or wandb-offline"
            )
        if self.name is not None and (not self.name.strip() or Path(self.name).name != self.name):
            raise InputError(f"name must be the plain name of a folder, got {self.name!r}")

    @property
    def run_name(self) -> str:
        """Name of the run's folder."""
        if self.name is not None:
            return self.name
        tasks = self.tasks if "," not in self.tasks else f"{len(parse_tasks(self.tasks))}tasks"
        return f"pretrain-{tasks}-w{self.width}-l{self.layers}-k{self.context}-lr{self.lr:g}-seed{self.seed}"


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    return parse_settings(
        Settings,
        "python -m experiments.metaworld pretrain",
        "Pre-train a Decision Transformer on demonstrations.",
        args,
    )


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line `args` (``sys.argv`` for None) and return what ``metrics.json`` holds.

    A finished run of the same settings is reported, not repeated; an interrupted one is resumed.

    Raises:
        MissingInputError: Demonstrations are missing.
        InputError: A setting or the data is wrong, or the folder holds a run of other settings.
    """
    settings = parse(args)
    tasks = parse_tasks(settings.tasks)
    rollout_tasks = tasks if settings.rollout_tasks is None else parse_tasks(settings.rollout_tasks)
    folder = RunFolder(Path(settings.output) / settings.run_name, asdict(settings), INCIDENTAL)
    if not settings.overwrite:
        result = folder.result()
        if result is not None:
            print(f"{folder.path} is finished already (--overwrite runs it again): {_headline(result)}")
            return result
    check_loggers(parse_loggers(settings.logger))
    return _run(settings, folder, tasks, rollout_tasks)


def _run(settings: Settings, folder: RunFolder, tasks: Sequence[str], rollout_tasks: Sequence[str]) -> dict[str, Any]:
    import logging

    import lightning as L

    from eva_lightning.rl.demonstrations import read_index
    from eva_lightning.rl.module import DecisionTransformerModule, save_weights
    from eva_lightning.rl.trajectories import TrajectoryDataModule
    from experiments.metaworld.history import StepHistory

    logger = logging.getLogger("experiments.metaworld")
    index = read_index(settings.data)
    for task in {*tasks, *rollout_tasks}:
        index[task]  # says what is missing before anything is built or deleted
    data = TrajectoryDataModule(
        settings.data,
        tasks,
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
    module = DecisionTransformerModule(data.statistics["state_mean"], data.statistics["state_std"], **sizes)
    if settings.compile:
        module.model.compile()
    if settings.overwrite:
        folder.clear()
    folder.start()
    loggers = open_loggers(parse_loggers(settings.logger), folder.path, settings.run_name, folder.config)
    with folder.logging(), loggers as started:
        logger.info(
            "%d tasks, %d training windows of %d steps, %.2fM parameters",
            len(tasks),
            len(data.train_dataloader().dataset),  # type: ignore[arg-type]
            settings.context,
            sum(p.numel() for p in module.parameters()) / 1e6,
        )
        history = StepHistory(folder.path / "metrics.csv", module.model.training_flops(settings.batch_size))
        callbacks: list[L.Callback] = [history]
        if settings.rollout_every:
            callbacks.insert(0, _rollouts(settings, rollout_tasks, {t: index[t].max_return for t in rollout_tasks}))
        metrics = _train(settings, folder, data, module, history, callbacks, started)
        about = {
            "tasks": list(tasks),
            "max_return": data.max_return,
            "mean_return": data.mean_return,
            **{key: metrics[key] for key in ("steps", "val_loss", "seed")},
        }
        save_weights(module, folder.path / "weights.ckpt", about=about)
        if settings.export is not None:
            import torch

            save_weights(module, settings.export, torch.float16, about)
        folder.finish(metrics)
        logger.info("%s -> %s", _headline(metrics), folder.path)
    return metrics


def _rollouts(settings: Settings, tasks: Sequence[str], target_returns: dict[str, float]) -> L.Callback:
    from eva_lightning.rl.rollout_callback import RolloutCallback

    return RolloutCallback(
        tasks,
        episodes=settings.rollout_episodes,
        every_n_steps=settings.rollout_every,
        target_returns=target_returns,
        video=settings.rollout_video,
    )


def _train(
    settings: Settings,
    folder: RunFolder,
    data: TrajectoryDataModule,
    module: DecisionTransformerModule,
    history: StepHistory,
    callbacks: list[L.Callback],
    loggers: list[Logger],
) -> dict[str, Any]:
    import logging

    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    logger = logging.getLogger("experiments.metaworld")
    checkpoints = ModelCheckpoint(
        folder.checkpoints,
        filename="last",
        every_n_train_steps=settings.checkpoint_every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    validates = settings.val_episodes > 0
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        precision=_precision(settings),  # type: ignore[arg-type]
        max_steps=settings.max_steps,
        max_epochs=-1,
        val_check_interval=settings.val_every if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if validates else 0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[*callbacks, checkpoints],
        logger=loggers or False,
        log_every_n_steps=min(50, settings.max_steps),
        enable_progress_bar=settings.progress and sys.stdout.isatty(),
        enable_model_summary=False,
    )
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        # how Lightning ends on Ctrl-C
        logger.warning(
            "interrupted after %d of %d updates: the same command continues from the last checkpoint, at most %d back",
            trainer.global_step,
            settings.max_steps,
            settings.checkpoint_every,
        )
        raise
    trainer.save_checkpoint(folder.checkpoints / "last.ckpt")
    losses = dict(trainer.validate(module, datamodule=data, verbose=False)[0]) if validates else {}
    return {
        "tasks": list(data.tasks),
        "steps": trainer.global_step,
        "seed": settings.seed,
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
    }


def _precision(settings: Settings) -> str:
    import torch

    if settings.precision != "auto":
        return settings.precision
    gpu = settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if gpu and torch.cuda.is_bf16_supported() else "32-true"


def _headline(metrics: dict[str, Any]) -> str:
    loss = "" if metrics["val_loss"] is None else f"validation loss {metrics['val_loss']:.4f} after "
    return (
        f"{len(metrics['tasks'])} tasks, {loss}{metrics['steps']:,} updates, "
        f"{metrics['updates_per_second']:.2f} updates/s, {metrics['model_flop_utilisation']:.0%} model FLOP utilisation"
    )


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
