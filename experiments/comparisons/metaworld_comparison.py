"""The Meta-World comparison as the runner takes it: what it needs, its runs, how long they take, its report."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from eva_lightning.errors import InputError
from eva_lightning.methods import MethodKey
from eva_lightning.rl.demonstrations import read_index
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments.comparisons import metaworld_report
from experiments.comparisons.metaworld import Settings
from experiments.comparisons.report import REPORT_FILES
from experiments.comparisons.settings import method_cells
from experiments.comparisons.timing import single_thread, step_seconds
from experiments.metaworld import finetune_run
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results, run_comparison
from experiments.runner.jobs import Job, Phase
from experiments.runner.run_folder import Work

#: Seconds that a run takes besides steps and rollouts: loading, EVA's streaming, validation losses.
_PER_RUN = 2.0

#: The trainer's share of a step.
_TRAINER = 1.1


def build(job: Job) -> Work:
    """The work of a job whose settings are those of one fine-tuning."""
    return finetune_run.build(job.settings)


class MetaWorld(Comparison):
    """All methods fine-tune one pre-trained network on every task.

    Args:
        settings: What to compare.
    """

    name = "compare"
    modules = ("peft", "experiments.metaworld.finetune_run")
    files = (*REPORT_FILES, "losses.png", "success.png", "differences.png")

    def __init__(self, settings: Settings) -> None:
        self.settings = self.options = settings

    def check(self) -> None:
        settings = self.settings
        read_checkpoint(settings.init)
        index = read_index(settings.data)
        for task in settings.task_names:
            episodes, needed = index[task].episodes, settings.train_episodes + settings.val_episodes
            if episodes < needed:
                raise InputError(f"{settings.data} has {episodes} episodes of {task}, but {needed} are needed")

    def cells(self) -> list[Cell]:
        return method_cells(self.settings, self._jobs)

    def _jobs(self, method: str, phase: Phase, lr: float, seed: int) -> list[Job]:
        key, settings = MethodKey.parse(method), self.settings
        rank = settings.rank if key.adapts else None
        return [
            Job(
                build,
                settings.run(task, method, phase, lr, seed),
                settings.output,
                phase,
                {"task": task, "method": method, "rank": rank, "rho": key.rho, "seed": seed, "lr": lr},
                f"{task}, {key.label}, lr {lr:g}, seed {seed}",
                order=seed,
            )
            for task in settings.task_names
        ]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Logarithm of the last validation loss: tasks of different scale count alike in its mean."""
        return (math.log(metrics["val_loss"][-1]["val_loss"]),)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        rate = metrics["success_rate"]
        success = "" if rate is None else f", success {rate:.2f}"
        return f"validation loss {metrics['val_loss'][-1]['val_loss']:.4f}{success}"

    def seconds(self) -> Callable[[Job], float]:
        """By steps of a method and rolled-out episodes, timed now."""
        step = functools.cache(functools.partial(training_seconds, self.settings))
        episode = episode_seconds(self.settings) if self.settings.eval_episodes else 0.0

        def seconds(job: Job) -> float:
            run = job.settings
            return run.max_steps * step(job.tags["method"]) + run.eval_episodes * episode + _PER_RUN

        return seconds

    def plan_notes(self) -> list[str]:
        settings = self.settings
        factors = f"{len(settings.labels)} methods x {len(settings.task_names)} tasks x {settings.seeds} seeds"
        return [
            f"tuning: runs of {settings.tune_steps} steps",
            f"comparison: runs of {settings.max_steps} steps and {settings.eval_episodes} episodes ({factors})",
        ]

    def report(self, results: Results) -> None:
        print(f"report: {metaworld_report.write(self.settings, results)}")


def training_seconds(settings: Settings, method: str) -> float:
    """Seconds per training step of a method."""
    entry = MethodKey.parse(method).entry
    like = entry.name
    if entry.state_kind is not None:  # EVA has the cost of LoRA, and its callback needs a trainer
        like = "dora" if entry.fixed.get("use_dora") else "lora"
    run = settings.run(settings.task_names[0], like, "final", 1e-3, 0)
    module = DecisionTransformerModule.from_pretrained(settings.init)
    data = TrajectoryDataModule(
        settings.data, run.task, module.context, run.batch_size, run.train_episodes, run.val_episodes,
        cache_dir=run.cache,
    )  # fmt: skip
    finetune_run.prepare(run, module)
    batch = next(iter(data.train_dataloader()))
    return _TRAINER * step_seconds(module, lambda: module.train().loss(batch))


def episode_seconds(settings: Settings) -> float:
    """Seconds per rolled-out episode in one thread."""
    task = settings.task_names[0]
    module = DecisionTransformerModule.from_pretrained(settings.init)
    n, steps = min(20, settings.eval_episodes), min(20, settings.horizon)
    with single_thread():
        evaluate(module, task, target_return=1000.0, episodes=1, horizon=1)  # the simulator's first start
        started = time.perf_counter()
        result = evaluate(module, task, target_return=1000.0, episodes=n, horizon=steps)
        building = time.perf_counter() - started - result.seconds
    return result.seconds / n * settings.horizon / steps + building / settings.eval_episodes


def run(settings: Settings) -> Results:
    return run_comparison(MetaWorld(settings))
