"""Fine-tune on one task: ``python -m experiments.metaworld finetune --task push-v3 --init CKPT --method eva``.

As the paper does it (sections 4.5 and E.2): normalisation of the pre-training data, embeddings without adapters, the
largest return of the task's demonstrations as target return, success measured by rollouts. Every method goes through
the same DecisionTransformerModule, and EVA through EVAInitCallback with padding left out of its decomposition.

Each task and seed is a folder of its own below OUTPUT: finished ones are reprinted, interrupted ones go on.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, unknown
from eva_lightning.rl.tasks import parse_tasks
from experiments.metaworld.table import EXPERIMENT, LABELS
from experiments.runner.cli import in_terminal
from experiments.runner.run_folder import RunFolder
from experiments.runner.settings import option, parse_settings

if TYPE_CHECKING:
    import lightning as L

    from eva_lightning.methods.apply import AdapterOptions
    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.rollouts import RolloutResult
    from eva_lightning.rl.trajectories import TrajectoryDataModule
    from experiments.metaworld.validation import ValidationLosses

HEADS = ("train", "freeze", "adapt")
WITHOUT_ADAPTERS = ("scratch", "fft")

#: A target return above this times the data's mean was measured to break tasks such as push.
HIGHEST_TARGET = 1.2

#: Settings that say where and how fast a run happens, not what comes out.
INCIDENTAL = (
    "data", "cache", "output", "name", "overwrite", "accelerator", "rollout_workers", "checkpoint_every", "progress",
)  # fmt: skip

_LOGGER = logging.getLogger("experiments.metaworld.finetune")


@dataclass(frozen=True)
class Settings:
    """Everything a fine-tuning is asked to do; with one task and seed, the layout of ``config.yaml``."""

    task: str = option(MISSING, "task such as push-v3, several with commas between them, or cw10: one run each")
    init: str = option(MISSING, "checkpoint of the pre-trained model, made by the pretrain command")
    method: str = option("eva", f"{', '.join(LABELS)}")
    rank: int = option(4, "LoRA rank; EVA's mean rank per layer; AdaLoRA's last")
    rho: float = option(2.0, "EVA: largest rank over mean rank, at least 1 (1 keeps ranks uniform)")
    alpha: float = option(1.0, "LoRA's alpha; updates are scaled by alpha / rank")
    bias: str = option("none", "biases to train with adapters: all, lora_only or none")
    head: str = option("train", "action head: train (in full), freeze, or adapt (like other layers)")
    seeds: int = option(3, "number of seeds, one run each")
    first_seed: int = option(0, "the first of them")
    data: str = option("data/metaworld", "folder of demonstrations, made by the collect command")
    train_episodes: int | None = option(20, "demonstrations to train on; none: all but the held-out ones")
    val_episodes: int = option(4, "held-out demonstrations for the validation loss, the last ones")
    target: str = option("executed", "actions to predict: executed (with noise) or expert (clean)")
    max_steps: int = option(500, "updates (the paper: 100,000)")
    batch_size: int = option(32, "windows per update (the paper: 128)")
    lr: float = option(1e-3, "peak learning rate; the best one differs between methods, tune it for each")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    warmup_steps: int = option(4000, "updates of linear warm-up; at most a tenth of all")
    dropout: float | None = option(None, "dropout of the network; that of pre-training if not given")
    context: int | None = option(None, "steps of a window; those of pre-training if not given")
    val_at: str = option("10,25,50,150,500", "updates after which the validation loss is noted, with commas")
    target_return: float | None = option(None, "return to ask for; the largest of the task's data if not given")
    eval_episodes: int = option(50, "episodes rolled out at the end; 0 for none")
    eval_seed: int = option(0, "seed of the evaluation goals, the same for every seed of training")
    mode: str = option("exact", "inference: exact window, or streaming (faster)")
    horizon: int = option(200, "steps of an evaluation episode, at most 500")
    rollout_workers: int = option(0, "processes for rollouts; 0 for none besides this one")
    checkpoint_every: int = option(100, "updates between checkpoints, from which an interrupted run continues")
    accelerator: str = option("auto", "Lightning accelerator: auto, cpu, gpu, mps, ...")
    cache: str | None = option(None, "folder for memory-mapped data; DATA/cache if not given")
    output: str = option("runs/metaworld", "folder that holds the runs")
    name: str | None = option(None, "what run folders are called, before -SEED; made of the settings if not given")
    overwrite: bool = option(False, "delete runs of these names first; without it, they are resumed or reprinted")
    progress: bool = option(True, "show progress bars")

    def __post_init__(self) -> None:
        if self.method not in LABELS:
            raise InputError(unknown("method", self.method, LABELS))
        if self.head not in HEADS:
            raise InputError(unknown("head", self.head, HEADS))
        for name, lowest in (
            ("rank", 1), ("seeds", 1), ("first_seed", 0), ("max_steps", 1), ("batch_size", 1), ("val_episodes", 1),
            ("eval_episodes", 0), ("checkpoint_every", 1), ("warmup_steps", 0), ("rollout_workers", 0),
        ):  # fmt: skip
            if getattr(self, name) < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise InputError(f"lr must be above 0, got {self.lr}")
        if self.name is not None and (not self.name.strip() or Path(self.name).name != self.name):
            raise InputError(f"name must be the plain name of a folder, got {self.name!r}")
        if self.name is not None and len(parse_tasks(self.task)) > 1:
            raise InputError(f"name={self.name!r} is for one task, but task names {len(parse_tasks(self.task))}")
        _ = self.val_steps

    @property
    def val_steps(self) -> tuple[int, ...]:
        """Updates after which the validation loss is noted: 0, those asked for, and the last."""
        try:
            wanted = {int(word) for word in self.val_at.split(",") if word.strip()}
        except ValueError:
            raise InputError(f"val_at must be numbers with commas between them, got {self.val_at!r}") from None
        return tuple(sorted(step for step in {0, self.max_steps, *wanted} if 0 <= step <= self.max_steps))

    @property
    def adapts(self) -> bool:
        """Whether the method has adapters."""
        return self.method not in WITHOUT_ADAPTERS

    def run_name(self, task: str, seed: int) -> str:
        """Name of a run's folder."""
        if self.name is not None:
            return f"{self.name}-{seed}"
        adapter = f"-r{self.rank}" if self.adapts else ""
        adapter += f"-rho{self.rho:g}" if "eva" in self.method else ""
        return f"{task}-{self.method}{adapter}-lr{self.lr:g}-steps{self.max_steps}-seed{seed}"

    def config(self, task: str, seed: int) -> dict[str, Any]:
        """What one run is asked to do."""
        shared = {name: value for name, value in asdict(self).items() if name not in ("seeds", "first_seed")}
        return {**shared, "task": task, "seed": seed}

    def adapter_options(self, seed: int) -> AdapterOptions:
        """The settings that concern adapters."""
        from eva_lightning.methods.apply import AdapterOptions

        bias: Any = self.bias  # checked there
        return AdapterOptions(rank=self.rank, alpha=self.alpha, bias=bias, rho=self.rho, seed=seed)


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = "Fine-tune a pre-trained Decision Transformer on one task, and measure success."
    return parse_settings(Settings, "python -m experiments.metaworld finetune", description, args)


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command line `args` (``sys.argv`` for None); returns what each run's ``metrics.json`` holds.

    Raises:
        MissingInputError: The checkpoint or the demonstrations are missing.
        InputError: A setting, the checkpoint or the data is wrong, or a folder holds a run of other settings.
    """
    settings = parse(args)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of kernels that nothing here needs
    results = []
    for task in parse_tasks(settings.task):
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
            config = settings.config(task, seed)
            folder = RunFolder(Path(settings.output) / settings.run_name(task, seed), config, INCIDENTAL)
            result = None if settings.overwrite else folder.result()
            if result is not None:
                print(f"{folder.path} is finished already (--overwrite runs it again): {headline(result)}")
            else:
                result = _run(settings, folder, task, seed)
            results.append(result)
    if settings.seeds > 1:
        print(summary(results))
    return results


def headline(metrics: dict[str, Any]) -> str:
    """One line on one run."""
    text = f"{metrics['task']}, {LABELS[metrics['method']]}, seed {metrics['seed']}: "
    text += f"validation loss {metrics['val_loss'][-1]['val_loss']:.4f} after {metrics['max_steps']} updates"
    if metrics["success_rate"] is None:
        return text
    return (
        f"{text}, success {metrics['success_rate']:.2f} ± {metrics['success_stderr']:.2f} (any step; last step "
        f"{metrics['final_success_rate']:.2f}), return {metrics['mean_return']:.0f} ± {metrics['return_stderr']:.0f} "
        f"over {metrics['episodes']} episodes"
    )


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One line per task: means and standard errors over seeds."""
    import statistics

    def over_seeds(values: list[float], digits: int) -> str:
        mean = f"{statistics.fmean(values):.{digits}f}"
        if len(values) < 2:
            return mean
        return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"

    lines = []
    for task in dict.fromkeys(result["task"] for result in results):
        runs = [result for result in results if result["task"] == task]
        text = f"{task}, {LABELS[runs[0]['method']]}, {len(runs)} seeds (mean ± standard error over seeds): "
        text += f"validation loss {over_seeds([run['val_loss'][-1]['val_loss'] for run in runs], 4)}"
        if runs[0]["success_rate"] is not None:
            text += f", success {over_seeds([run['success_rate'] for run in runs], 2)}"
            text += f", return {over_seeds([run['mean_return'] for run in runs], 0)}"
        lines.append(text)
    return "\n".join(lines)


def prepare(
    settings: Settings, module: DecisionTransformerModule, seed: int
) -> tuple[DecisionTransformerModule, list[L.Callback]]:
    """The module to train and the callbacks to train with.

    Embeddings never have adapters, whatever the head does.
    """
    import torch
    from torch import nn

    from eva_lightning.methods.apply import apply_method
    from eva_lightning.side_effects import isolated_rng

    if settings.method == "scratch":
        # the network's own initialisation, with the pre-training's normalisation
        with isolated_rng():
            torch.manual_seed(seed)
            return type(module)(**module.hparams), []
    layers = dict(module.named_modules())
    exclude = [name for name in module.embedding_names() if isinstance(layers[name], nn.Linear)]
    if settings.head == "freeze":
        exclude.append(module.head_name)
    head = module.head_name if settings.head == "train" else None
    options = settings.adapter_options(seed)
    callbacks = apply_method(settings.method, module, options, head=head, exclude=exclude, mask_fn=module.mask_fn)
    return module, callbacks


def warn_of_target(task: str, target: float, mean: float) -> None:
    """Log a warning where a target return is far above what the data has on average."""
    if target > HIGHEST_TARGET * mean > 0:
        _LOGGER.warning(
            "%s: the target return %.0f is %.2f times the mean return %.0f of its data; above %g times, some tasks "
            "(push) were measured to fail. --target-return sets another",
            task, target, target / mean, mean, HIGHEST_TARGET,
        )  # fmt: skip


def _run(settings: Settings, folder: RunFolder, task: str, seed: int) -> dict[str, Any]:
    import lightning as L

    from eva_lightning.rl.demonstrations import read_index
    from eva_lightning.rl.environments import check_horizon
    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.trajectories import TrajectoryDataModule

    check_horizon(settings.horizon)
    overrides = {
        "lr": settings.lr, "min_lr": min(1e-6, settings.lr), "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup_steps, "dropout": settings.dropout, "context": settings.context,
    }  # fmt: skip
    given = {name: value for name, value in overrides.items() if value is not None}
    L.seed_everything(seed, workers=True, verbose=False)
    pretrained = DecisionTransformerModule.from_pretrained(settings.init, **given)
    read_index(settings.data)[task]  # says what is missing before anything is deleted
    data = TrajectoryDataModule(
        settings.data,
        [task],
        context=pretrained.context,
        batch_size=settings.batch_size,
        episodes=settings.train_episodes,
        val_episodes=settings.val_episodes,
        seed=seed,
        cache_dir=settings.cache,
        target=settings.target,
    )
    module, callbacks = prepare(settings, pretrained, seed)
    if settings.overwrite:
        folder.clear()
    folder.start()
    with folder.logging():
        target = settings.target_return if settings.target_return is not None else data.max_return[task]
        warn_of_target(task, target, data.mean_return[task])
        about = {
            "tasks": [task], "method": settings.method, "init": settings.init, "seed": seed,
            "max_return": {task: target}, "mean_return": data.mean_return,
        }  # fmt: skip
        metrics = _train(settings, folder, data, module, callbacks, about)
        metrics |= measure(settings, task, module, target)
        _save(folder, module, callbacks, about)
        folder.finish(metrics)
        _LOGGER.info("%s -> %s", headline(metrics), folder.path)
    return metrics


def _train(
    settings: Settings,
    folder: RunFolder,
    data: TrajectoryDataModule,
    module: DecisionTransformerModule,
    callbacks: list[L.Callback],
    about: dict[str, Any],
) -> dict[str, Any]:
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint

    from experiments.metaworld.validation import About, ValidationLosses

    losses = ValidationLosses(settings.val_steps)
    checkpoints = ModelCheckpoint(
        folder.checkpoints,
        filename="last",
        every_n_train_steps=settings.checkpoint_every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        max_steps=settings.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[*callbacks, losses, About(about), checkpoints],
        logger=False,
        enable_progress_bar=settings.progress and sys.stdout.isatty(),
        enable_model_summary=False,
    )
    checkpoint = folder.last_checkpoint()
    if checkpoint is not None:
        _LOGGER.info("resuming from %s", checkpoint)
    started = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        # how Lightning ends on Ctrl-C
        _LOGGER.warning(
            "interrupted after %d of %d updates: the same command continues from the last checkpoint, at most %d back",
            trainer.global_step,
            settings.max_steps,
            settings.checkpoint_every,
        )
        raise
    seconds = time.perf_counter() - started
    trainer.save_checkpoint(folder.checkpoints / "last.ckpt")
    return training_metrics(settings, data, module, callbacks, losses, about) | {"train_seconds": seconds}


def training_metrics(
    settings: Settings,
    data: TrajectoryDataModule,
    module: DecisionTransformerModule,
    callbacks: list[L.Callback],
    losses: ValidationLosses,
    about: dict[str, Any],
) -> dict[str, Any]:
    """What a ``metrics.json`` says about a training that has ended."""
    import torch

    from eva_lightning.callback import EVAInitCallback

    (task,) = data.tasks
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for n, p in module.named_parameters() if "lora_" not in n)
    state = next((c.state for c in callbacks if isinstance(c, EVAInitCallback)), None)
    train_episodes = settings.train_episodes or len(data.store) - settings.val_episodes
    metrics: dict[str, Any] = {
        "experiment": EXPERIMENT,
        "task": task,
        "method": settings.method,
        "rank": settings.rank if settings.adapts else None,
        "rho": settings.rho if "eva" in settings.method else None,
        "seed": about["seed"],
        "init": settings.init,
        "lr": settings.lr,
        "max_steps": settings.max_steps,
        "batch_size": settings.batch_size,
        "train_episodes": train_episodes,
        "trainable_parameters": trained,
        "total_parameters": total,
        "val_loss": losses.rows,
        "data_mean_return": data.mean_return[task],
        "torch": torch.__version__,
    }
    if state is not None:
        metrics |= {"init_seconds": state.seconds, "init_batches": state.n_batches, "ranks": dict(state.ranks)}
    return metrics


def measure(settings: Settings, task: str, module: DecisionTransformerModule, target: float) -> dict[str, Any]:
    """Roll out the trained `module`; what a ``metrics.json`` says about it, with None for no rollouts."""
    common = {"target_return": target, "horizon": settings.horizon, "episodes": settings.eval_episodes}
    if settings.eval_episodes == 0:
        names = ("success_rate", "success_stderr", "final_success_rate", "mean_return", "return_stderr")
        return {**common, **dict.fromkeys(names)}
    from eva_lightning.rl.rollouts import evaluate

    result = evaluate(
        module,
        task,
        target_return=target,
        episodes=settings.eval_episodes,
        seed=settings.eval_seed,
        mode=settings.mode,  # type: ignore[arg-type]  # checked by the policy
        horizon=settings.horizon,
        workers=settings.rollout_workers,
        progress=settings.progress and sys.stdout.isatty(),
    )
    return {**common, **rollout_metrics(result)}


def rollout_metrics(result: RolloutResult) -> dict[str, Any]:
    """What a ``metrics.json`` says about rollouts."""
    return {
        "success_rate": result.success_rate,
        "success_stderr": result.success_stderr,
        "final_success_rate": result.final_success_rate,
        "mean_return": result.mean_return,
        "return_stderr": result.return_stderr if len(result) > 1 else 0.0,
        "successes": result.successes.tolist(),
        "returns": result.returns.tolist(),
        "rollout_seconds": result.seconds,
        "rollout_steps": result.steps,
    }


def _save(
    folder: RunFolder, module: DecisionTransformerModule, callbacks: list[L.Callback], about: dict[str, Any]
) -> None:
    """The adapters for stock PEFT, EVA's state, and the whole network with adapters merged, in one file."""
    import copy

    from eva_lightning.adapters import save_pretrained
    from eva_lightning.adapters.registry import has_adapters
    from eva_lightning.callback import EVAInitCallback
    from eva_lightning.rl.module import save_weights

    if has_adapters(module.model):
        save_pretrained(copy.deepcopy(module.model).cpu(), folder.path / "adapter")
    save_weights(merged(module), folder.path / "weights.ckpt", about=about)
    for callback in callbacks:
        if isinstance(callback, EVAInitCallback) and callback.state is not None:
            callback.state.without_components().save(folder.path / "eva_state")


def merged(module: DecisionTransformerModule) -> DecisionTransformerModule:
    """A module like `module` on the CPU, with the adapters added to the weights: the same function, faster."""
    import copy

    from eva_lightning.adapters import merge_and_unload
    from eva_lightning.adapters.registry import has_adapters
    from eva_lightning.rl.module import DecisionTransformerModule

    network = copy.deepcopy(module.model).cpu()
    if has_adapters(network):
        network = merge_and_unload(network)  # type: ignore[assignment]
    whole = DecisionTransformerModule(**module.hparams)
    whole.model.load_state_dict(network.state_dict())
    return whole


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
