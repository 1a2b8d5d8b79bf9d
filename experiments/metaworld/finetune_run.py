"""One fine-tuning from beginning to end: load, prepare the method, train, roll out, save.

The finetune command, the comparison and the demo all do their runs by :func:`build`.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from torch import nn

from eva_lightning.adapters import merge_and_unload, save_pretrained
from eva_lightning.adapters.registry import has_adapters
from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.protocol import Protocol, check_protocol, get_protocol, protocol_of
from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments.metaworld.finetune import EXPERIMENT, Settings
from experiments.metaworld.measures import EPISODE_BRACKETS, rates_text, rollout_metrics, success_text, warn_of_target
from experiments.metaworld.success import PAPER_NOTE
from experiments.metaworld.training import About, Looks, ValidationLosses, fit, log_differences, make_trainer
from experiments.runner.gradient_norms import gradient_norms
from experiments.runner.lightning_runs import (
    Divergence,
    check_devices,
    eva_metrics,
    eva_state,
    on_gpu,
    trainer_precision,
)
from experiments.runner.loggers import check_loggers, open_loggers, parse_loggers
from experiments.runner.run_folder import RunFolder, Work, is_follower, perform_or_report
from experiments.runner.run_logging import RunLogging
from experiments.runner.settings import plain
from experiments.runner.statistics import PLUS_MINUS, Interval

_LOGGER = logging.getLogger(__name__)

#: Results of rollouts.
ROLLED_OUT = ("success_rate", "final_success_rate", "mean_return")


def run_all(settings: Settings) -> list[dict[str, Any]]:
    """The metrics of all tasks and seeds; finished ones are reported, interrupted ones resumed."""
    results = []
    for run in settings.runs():
        folder = RunFolder.below(run.output, run.run_name, run)
        results.append(perform_or_report(folder, partial(build, run), headline, run.overwrite))
    if settings.seeds > 1 and not is_follower():
        print(summary(results))
    return results


def build(settings: Settings) -> Work:
    """Load and prepare everything of a single run, refusing what is wrong; nothing is written but the data's cache.

    Returns:
        The work to do in the run's folder, a function that returns the metrics.

    Raises:
        MissingInputError: The checkpoint or the demonstrations are missing.
        InputError: A setting, the checkpoint or the data is wrong.
    """
    started = time.perf_counter()
    (task,) = settings.task
    check_devices(settings.devices, settings.accelerator)
    check_loggers(parse_loggers(settings.logger))
    L.seed_everything(settings.seed, workers=True, verbose=False)
    module = _load(settings)
    data = TrajectoryDataModule(
        settings.data,
        [task],
        context=module.context,
        batch_size=settings.batch_size // settings.devices,
        episodes=settings.train_episodes,
        val_episodes=settings.val_episodes,
        seed=settings.seed,
        cache_dir=settings.cache,
        target=settings.target,
    )
    callbacks = prepare(settings, module)

    def work(folder: RunFolder) -> dict[str, Any]:
        target = data.max_return[task] if settings.target_return is None else settings.target_return
        warn_of_target(task, target, data.mean_return[task])
        run = _Run(settings, task, module, data, callbacks, target)
        log_differences(run.protocol)
        names = () if is_follower() else parse_loggers(settings.logger)
        with open_loggers(names, folder.path, settings.run_name, plain(settings), **run.groups()) as loggers:
            metrics = {**run.described(), **run.train(folder, loggers)}
            if is_follower():
                return metrics
            # weights that are NaN act on nothing, and cannot be merged
            diverged = "diverged" in metrics
            metrics |= run.not_rolled_out() if diverged or settings.eval_episodes == 0 else run.roll_out()
            for logger in loggers:
                rolled_out = {name: metrics[name] for name in ROLLED_OUT if metrics[name] is not None}
                logger.log_metrics(rolled_out, step=settings.max_steps)
        if settings.save and not diverged:
            run.save(folder)
        metrics["seconds"] = time.perf_counter() - started
        _LOGGER.info("%s -> %s", headline(metrics), folder.path)
        return metrics

    return work


def _load(settings: Settings) -> DecisionTransformerModule:
    overrides = {
        "lr": settings.lr, "min_lr": min(settings.min_lr, settings.lr), "weight_decay": settings.weight_decay,
        "warmup_steps": settings.warmup_steps, "dropout": settings.dropout, "context": settings.context,
        "gradient_clip": settings.gradient_clip,
    }  # fmt: skip
    given = {name: value for name, value in overrides.items() if value is not None}
    module = DecisionTransformerModule.from_pretrained(settings.init, **given)
    if settings.protocol is not None:
        check_protocol(get_protocol(settings.protocol), module.hparams, settings.init)
    return module


def prepare(settings: Settings, module: DecisionTransformerModule) -> list[L.Callback]:
    """Do to the module what the method does before training, and return the callbacks to train with.

    Embeddings never have adapters, whatever the head does.
    """
    exclude = without_adapters(module, settings.head)
    head = module.head_name if settings.head == "train" else None
    bias: Any = settings.bias
    options = AdapterOptions(
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=settings.target_modules,
        bias=bias,
        rho=settings.rho,
        algorithm=settings.algorithm,
        seed=settings.seed,
        keep_function=settings.keep_function,
    )
    return apply_method(settings.method, module, options, head=head, exclude=exclude, mask_fn=module.mask_fn)


def without_adapters(module: DecisionTransformerModule, head: str = "train") -> list[str]:
    """The linear layers that never have an adapter: the embeddings, and the head where it is frozen."""
    layers = dict(module.named_modules())
    names = [name for name in module.embedding_names() if isinstance(layers[name], nn.Linear)]
    return [*names, module.head_name] if head == "freeze" else names


@dataclass(frozen=True)
class _Run:
    settings: Settings
    task: str
    module: DecisionTransformerModule
    data: TrajectoryDataModule
    callbacks: Sequence[L.Callback]
    target: float

    @property
    def protocol(self) -> Protocol | None:
        """The checkpoint's, which fine-tuning keeps; None for one without a name."""
        return protocol_of(self.module.hparams)

    @property
    def about(self) -> dict[str, Any]:
        """What checkpoints say of where they come from."""
        settings = self.settings
        return {
            "tasks": [self.task], "method": settings.method, "init": settings.init, "seed": settings.seed,
            "max_return": {self.task: self.target}, "mean_return": self.data.mean_return,
            "protocol": self.protocol and self.protocol.name,
        }  # fmt: skip

    def described(self) -> dict[str, Any]:
        """The part of the metrics that is known before the training."""
        settings = self.settings
        return {
            "experiment": EXPERIMENT,
            "task": self.task,
            "method": settings.method,
            "rank": settings.rank if settings.key.adapts else None,
            "rho": settings.key.rho,
            "seed": settings.seed,
            "init": settings.init,
            "protocol": self.protocol and self.protocol.name,
            "lr": settings.lr,
            "max_steps": settings.max_steps,
            "batch_size": settings.batch_size,
            "train_episodes": settings.train_episodes or len(self.data.store) - settings.val_episodes,
            "total_parameters": sum(p.numel() for n, p in self.module.named_parameters() if "lora_" not in n),
            "data_mean_return": self.data.mean_return[self.task],
            "torch": torch.__version__,
        }

    def groups(self) -> dict[str, Any]:
        """What wandb knows the run by: seeds of one setting belong together."""
        settings = self.settings
        return {"group": settings.run_name.rpartition("-")[0], "tags": (self.task, settings.method)}

    def train(self, folder: RunFolder, loggers: list[Logger]) -> dict[str, Any]:
        """Train; what the metrics say about it."""
        settings = self.settings
        losses, divergence = ValidationLosses(settings.val_steps), Divergence()
        monitors = [RunLogging(epochs=False), LearningRateMonitor("step")] if loggers else []
        looks = Looks(settings.look_steps, self._rolled_out)
        norms = gradient_norms(settings.gradient_norms, folder, without_adapters(self.module, settings.head))
        trainer = make_trainer(
            folder,
            max_steps=settings.max_steps,
            checkpoint_every=settings.checkpoint_every,
            checkpoint_minutes=settings.checkpoint_minutes,
            progress=settings.progress,
            callbacks=[*self.callbacks, losses, divergence, looks, *norms, About(self.about), *monitors],
            accelerator=settings.accelerator,
            devices=settings.devices,
            precision=trainer_precision(settings.precision, settings.accelerator),
            limit_val_batches=0,
            logger=loggers or False,
            log_every_n_steps=min(50, settings.max_steps),
        )
        started = time.perf_counter()
        fit(trainer, self.module, self.data, folder)
        return {
            "train_seconds": time.perf_counter() - started,
            "precision": trainer.precision,
            "device": str(trainer.strategy.root_device),
            "val_loss": losses.rows,
            **({"looks": looks.rows} if settings.look_steps else {}),
            "trainable_parameters": sum(p.numel() for p in self.module.parameters() if p.requires_grad),
            **eva_metrics(self.callbacks),
            **divergence.metrics(trainer, self.module),
        }

    def not_rolled_out(self) -> dict[str, Any]:
        """What the metrics say where nothing was rolled out: None for the results."""
        settings = self.settings
        common = {"target_return": self.target, "horizon": settings.horizon, "episodes": settings.eval_episodes}
        return {**common, **dict.fromkeys(ROLLED_OUT)}

    def roll_out(self) -> dict[str, Any]:
        """Roll out the trained network; what the metrics say about it."""
        return {**self.not_rolled_out(), **self._rolled_out(self.module)}

    def _rolled_out(self, module: DecisionTransformerModule) -> dict[str, Any]:
        """Success and returns of `module` as it is.

        It is rolled out merged, in fp32: the same function in less than half the time. On a GPU where it was trained on
        one, which Lightning has taken it away from at the end.
        """
        settings = self.settings
        device = "cuda" if on_gpu(settings.accelerator) else self.module.device
        mode: Any = settings.mode
        result = evaluate(
            merged(module).to(device),
            self.task,
            target_return=self.target,
            episodes=settings.eval_episodes,
            seed=settings.eval_seed,
            mode=mode,
            horizon=settings.horizon,
            workers=settings.rollout_workers,
            progress=settings.progress and sys.stdout.isatty(),
        )
        return rollout_metrics(result)

    def save(self, folder: RunFolder) -> None:
        """The adapters for stock PEFT, EVA's state, and the whole network with adapters merged, in one file."""
        if has_adapters(self.module.model):
            save_pretrained(copy.deepcopy(self.module.model).cpu(), folder.path / "adapter")
        save_weights(merged(self.module), folder.path / "weights.ckpt", about=self.about)
        state = eva_state(self.callbacks)
        if state is not None:
            state.without_components().save(folder.path / "eva_state")


def merged(module: DecisionTransformerModule) -> DecisionTransformerModule:
    """A module like `module` on the CPU, with the adapters added to the weights: the same function, faster."""
    network = copy.deepcopy(module.model).cpu()
    if has_adapters(network):
        network = merge_and_unload(network)  # type: ignore[assignment]
    whole = DecisionTransformerModule(**module.hparams)
    whole.model.load_state_dict(network.state_dict())
    return whole


def headline(metrics: Mapping[str, Any]) -> str:
    """One line on one run."""
    label = MethodKey(metrics["method"], metrics["rho"]).label
    text = f"{metrics['task']}, {label}, seed {metrics['seed']}: "
    text += f"validation loss {metrics['val_loss'][-1]['val_loss']:.4f} after {metrics['max_steps']} steps"
    if metrics["success_rate"] is None:
        return text
    return (
        f"{text}, success: {success_text(metrics)} ({EPISODE_BRACKETS}), "
        f"return {Interval.of(metrics['returns']).text(0)} over {metrics['episodes']} episodes"
    )


def summary(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per task: means and intervals over seeds."""
    lines, rolled_out = [], False
    for task in dict.fromkeys(result["task"] for result in results):
        runs = [result for result in results if result["task"] == task]
        label = MethodKey(runs[0]["method"], runs[0]["rho"]).label
        losses = Interval.of([run["val_loss"][-1]["val_loss"] for run in runs])
        text = f"{task}, {label}, {len(runs)} seeds: validation loss {losses.text(4)}"
        if runs[0]["success_rate"] is not None:
            rolled_out = True
            text += f", success: {rates_text(runs)}"
            text += f", return {Interval.of([run['mean_return'] for run in runs]).text(0)}"
        lines.append(text)
    return "\n".join([*lines, PLUS_MINUS, *([PAPER_NOTE] if rolled_out else [])])
