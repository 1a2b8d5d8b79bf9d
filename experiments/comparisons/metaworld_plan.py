"""How long the runs of a Meta-World comparison take on this machine, and what has to be there before they can start."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eva_lightning.errors import InputError
from eva_lightning.methods import MethodKey
from eva_lightning.rl.demonstrations import read_index
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments.comparisons.metaworld import Settings
from experiments.comparisons.settings import Part, adapts
from experiments.comparisons.timing import cost_class, single_thread, step_seconds
from experiments.metaworld import finetune_run
from experiments.runner.cells import Cell
from experiments.runner.jobs import Point
from experiments.runner.lightning_runs import on_gpu, trainer_precision

#: The trainer's share of a step.
_TRAINER = 1.1
#: A measured step takes no longer than about this: of a large network on a CPU it has fewer windows.
_STEP_SECONDS = 1.0
#: Steps of an episode that are rolled out where the window slides.
_SLIDING = 4
#: The paper's run of one task (section E.2): 100,000 steps in about an hour on an A100.
_PAPER_STEPS = 100_000


def check_demonstrations(settings: Settings) -> None:
    """Make sure that every task has enough.

    Raises:
        MissingInputError: A task has none.
        InputError: One has too few.
    """
    index = read_index(settings.data)
    needed = (settings.numbers[-1] or 1) + settings.val_episodes
    for task in dict.fromkeys((*settings.task_names, *settings.tuning_tasks)):
        episodes = index[task].episodes
        if episodes < needed:
            raise InputError(f"{settings.data} has {episodes} episodes of {task}, but {needed} are needed")


class Speed:
    """What steps and episodes take, measured when it is asked for.

    Without the checkpoint it is that of an untrained network of the paper's size, without demonstrations of made-up
    windows.

    Args:
        settings: The comparison.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = "cuda" if on_gpu(settings.accelerator) else "cpu"
        self.kinds: dict[str, float] = {}
        self.windows = settings.batch_size

    def step(self, method: str) -> float:
        """Seconds per training step of a method."""
        kind = cost_class(method)
        if kind not in self.kinds:
            self.kinds[kind] = self._measured_step(kind)
        return self.kinds[kind]

    @cached_property
    def episode(self) -> float:
        """Seconds per rolled-out episode: steps that fill the window, and steps with a full one, which cost more."""
        settings = self.settings
        if not settings.eval_episodes:
            return 0.0
        module, n = self._module().to(self.device), min(20, settings.eval_episodes)
        filling = min(module.context, settings.horizon)
        sliding = min(_SLIDING, settings.horizon - filling)

        def seconds(horizon: int) -> tuple[float, float]:
            started = time.perf_counter()
            task = settings.task_names[0]
            found = evaluate(module, task, target_return=1000.0, episodes=n, horizon=horizon).seconds
            return found, time.perf_counter() - started - found

        with single_thread():
            seconds(1)  # the simulator's first start
            first, building = seconds(filling)
            rest = 0.0
            if sliding:
                rest = max(0.0, seconds(filling + sliding)[0] - first) / sliding * (settings.horizon - filling)
        return (first + rest) / n + building / settings.eval_episodes

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """What has to be there before the runs can start, and is not."""
        found = []
        for what, check in (
            ("checkpoint", lambda: read_checkpoint(self.settings.init)),
            ("demonstrations", lambda: check_demonstrations(self.settings)),
        ):
            try:
                check()
            except InputError as error:
                found.append(f"{what}: MISSING: {error}")
        return tuple(found)

    def _measured_step(self, kind: str) -> float:
        settings = self.settings
        part = Part(kind, rank=max(settings.ranks or (settings.rank,)) if adapts(kind) else None)
        module = self._module()
        finetune_run.prepare(settings.run(part, "final", Point.of(lr=1e-3), 0, settings.task_names[0]), module)
        module.to(self.device)

        def seconds(windows: int, **how: int) -> float:
            batch = {name: value[:windows].to(self.device) for name, value in self._batch.items()}

            def loss() -> torch.Tensor:
                with self._autocast():
                    return module.train().loss(batch)

            return step_seconds(module, loss, device=self.device, **how)

        whole = settings.batch_size
        self.windows = max(1, min(whole, int(_STEP_SECONDS / seconds(1, times=2, warm_up=1))))
        times = {"times": 8, "warm_up": 2} if self.windows == whole else {"times": 3, "warm_up": 1}
        return _TRAINER * seconds(self.windows, **times) * whole / self.windows

    def _autocast(self) -> Any:
        precision = trainer_precision(self.settings.precision, self.settings.accelerator)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype)

    def _module(self) -> DecisionTransformerModule:
        context = {} if self.settings.context is None else {"context": self.settings.context}
        if Path(self.settings.init).is_file():
            return DecisionTransformerModule.from_pretrained(self.settings.init, **context)
        return DecisionTransformerModule(**context)  # type: ignore[arg-type]

    @cached_property
    def _batch(self) -> dict[str, torch.Tensor]:
        settings, module = self.settings, self._module()
        if not any(line.startswith("demonstrations") for line in self.missing):
            data = TrajectoryDataModule(
                settings.data, settings.task_names[:1], module.context, settings.batch_size, settings.numbers[-1],
                settings.val_episodes, cache_dir=settings.cache,
            )  # fmt: skip
            return dict(next(iter(data.train_dataloader())))
        b, k = settings.batch_size, module.context
        sizes = {"states": module.hparams["state_dim"], "actions": module.hparams["action_dim"]}
        batch = {name: torch.zeros(b, k, size) for name, size in sizes.items()}
        batch |= {name: torch.zeros(b, k) for name in ("rewards", "returns_to_go")}
        return batch | {"timesteps": torch.arange(k).repeat(b, 1), "mask": torch.ones(b, k, dtype=torch.bool)}


def notes(settings: Settings, speed: Speed, cells: Iterable[Cell]) -> list[str]:
    """Lines of the plan besides the number of runs and their estimate."""
    factors = f"{len(settings.labels)} methods x {len(settings.task_names)} tasks x {settings.seeds} seeds"
    episodes = "" if settings.select == "loss" else f" and {settings.eval_episodes} episodes"
    if settings.demonstrations:
        factors += f" x {len(settings.demonstrations)} numbers of demonstrations"
    looks = "".join(f", after {step} too" for step in settings.look_steps[:-1])
    lines = [
        f"tuning: runs of {settings.tune_steps} steps{episodes}",
        f"comparison: runs of {settings.max_steps} steps and {settings.eval_episodes} episodes{looks} ({factors})",
        *speed.missing,
    ]
    if any(line.startswith("checkpoint") for line in speed.missing):
        lines.append("  timed with an untrained network of the paper's size: 4 layers of width 512")
    # made first: it measures
    by_method = list(_by_method(settings, speed, cells)) if settings.searches else []
    steps = ", ".join(f"{kind} {seconds:.3g}" for kind, seconds in speed.kinds.items())
    scaled = "" if speed.windows == settings.batch_size else f" (from {speed.windows})"
    lines.append(
        f"measured: seconds per step of {settings.batch_size} windows{scaled}: {steps}; per episode "
        f"{speed.episode:.3g}; on {_device(speed)}"
    )
    return [*lines, *by_method]


def _by_method(settings: Settings, speed: Speed, cells: Iterable[Cell]) -> Iterator[str]:
    """Number of runs and time of each method, finished ones too."""
    runs: dict[str, list[int]] = {method: [0, 0] for method in settings.labels}
    for part, cell in zip(settings.parts, cells, strict=True):
        tasks = len(settings.task_names) if part.task is None else 1
        if cell.given is None:
            tuning_tasks = len(settings.tuning_tasks) if part.task is None else 1
            runs[part.method][0] += len(cell.points) * settings.tune_seeds * tuning_tasks
        runs[part.method][1] += settings.seeds * tasks
    tuned = 0 if settings.select == "loss" else settings.eval_episodes
    steps = 0
    for method, (tune, final) in runs.items():
        of_method = tune * settings.tune_steps + final * settings.max_steps
        episodes = tune * tuned + final * settings.eval_episodes * len(settings.look_steps)
        hours = (of_method * speed.step(MethodKey.parse(method).method) + episodes * speed.episode) / 3600
        steps += of_method
        points = len(settings.points(next(part for part in settings.parts if part.method == method)))
        yield f"  {method:<12} {tune:>6,} tuning + {final:>4,} final runs, {points:>3} points, {hours:>12,.1f} hours"
    if settings.max_steps == _PAPER_STEPS:
        yield f"  at the paper's speed, about an A100-hour per 100,000 steps: {steps / _PAPER_STEPS:,.0f} A100-hours"


def _device(speed: Speed) -> str:
    if speed.device == "cuda":
        return torch.cuda.get_device_name()
    threads = speed.settings.threads_per_run()
    return f"one thread of the CPU{'' if threads == 1 else f', of which runs have {threads}'}"
