"""The benchmark as a comparison for the runner: its cells, its runs, how they are scored. Settings: sweep_settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from eva_lightning.methods.registry import MethodKey
from eva_lightning.vision.backbone.backbone_cache import reuse_backbones
from experiments.runner.calling import as_called
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results, run_comparison
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.run_folder import Work
from experiments.runner.tuning import Choice, best_of_each
from experiments.runner.worker import WorkerOptions
from experiments.vtab import run
from experiments.vtab.grid import score
from experiments.vtab.plan import Plan, protocol_notes
from experiments.vtab.states import SharedState
from experiments.vtab.sweep_checks import check_everything, check_names, may_keep_models
from experiments.vtab.sweep_settings import Contender, Settings

_LOGGER = logging.getLogger("experiments.runner.comparison")

#: Phase -> training split (paper, section D.3): tuned on 800/200, trained on all 1,000 and tested.
SPLITS: dict[Phase, str] = {"tune": "train800", "final": "train800val200"}


class Sweep(Comparison):
    """All tasks and methods; each pair is tuned alone."""

    name = "VTAB-1K"
    modules = ("peft", "timm", "experiments.vtab.sweep")

    def __init__(self, settings: Settings) -> None:
        self.options = self.settings = settings

    @cached_property
    def _plan(self) -> Plan:
        return Plan.of(self, self.settings)

    def check(self) -> None:
        """Refuse wrong names, missing data and weights, and a disk without room; of a plan the first only."""
        (check_names if self.settings.plan else check_everything)(self.settings)

    def cells(self) -> list[Cell]:
        return [self._cell(task, each) for task in self.settings.task_names for each in self.settings.contenders]

    def _cell(self, task: str, contender: Contender) -> Cell:
        grid = self.settings.search

        def jobs(phase: Phase, seeds: tuple[int, ...], point: Point) -> list[Job]:
            key = contender.key_at(point.get("rho"))
            return [make_job(self.settings, task, key, phase, point, seed) for seed in seeds]

        def also(choice: Choice) -> list[Point]:
            best = best_of_each(choice, "rho")
            return [best[key.rho] for key in contender.always if key.rho in best]

        return Cell(
            f"{task}, {contender.name}",
            grid.points(contender.adapts, contender.searches_rho),
            partial(jobs, "tune", grid.tune_seeds),
            partial(jobs, "final", grid.final_seeds),
            also=also,
        )

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        return score(metrics, self.settings.select)

    def in_words(self, score: tuple[float, ...]) -> str:
        """The accuracy or the loss a choice was made by."""
        by_loss = self.settings.select == "loss"
        return f"{f'a loss of {score[0]:.3f}' if by_loss else f'{-score[0]:.1%}'} on val200"

    def headline(self, metrics: Mapping[str, Any]) -> str:
        return f"{metrics.get('evaluation_split')} {metrics['accuracy']:.1%}"

    def worker_options(self) -> WorkerOptions:
        """Processes keep the pre-trained model between runs, where memory allows it."""
        start = partial(reuse_backbones, may_keep_models(self.settings))
        return replace(super().worker_options(), start=start)

    def seconds(self) -> Callable[[Job], float]:
        return self._plan.seconds()

    def prepare(self) -> None:
        """Say what the protocol means for each method."""
        for sentence in protocol_notes(self.settings):
            _LOGGER.info("%s", sentence)

    def plan_notes(self) -> list[str]:
        return self._plan.notes()

    def report(self, results: Results) -> None:
        """Say how to make the tables."""
        precisions = sorted(set(results.runs["precision"].astype(str))) if "precision" in results.runs else []
        if len(precisions) > 1:
            print(f"note: runs differ in precision ({', '.join(precisions)}), as their devices do; see --precision")
        print(as_called(f"the table: python -m experiments.vtab table --runs {self.settings.output}"), flush=True)


def make_job(settings: Settings, task: str, key: MethodKey, phase: Phase, point: Point, seed: int) -> Job:
    """A run of the grid's `point`, by a method whose ρ is that of the point, where it has one."""
    point = point.replace(rho=None)
    single = settings.run(
        task, key, seed=seed, split=SPLITS[phase], **point.as_dict(),
        validate=settings.validate and phase == "tune", plots=False, save_adapter=phase == "final",
        checkpoint_minutes=settings.checkpoint_minutes,
    )  # fmt: skip
    tags = {"task": task, "method": key.key, "seed": seed, "lr": None, "rank": None, **point.as_dict()}
    if key.rho is not None:
        tags["rho"] = key.rho
    text = f"{task}, {key}, {point}, seed {seed}, {phase}"
    shared = SharedState.of(single, settings.components(key))
    return Job(build, single, settings.output, phase, tags, text, shared)


def build(job: Job) -> Work:
    """The work of a job, with the EVA state it shares: the first job that needs it computes it."""
    settings = job.settings
    if isinstance(job.shared, SharedState):
        settings = replace(settings, eva_state=str(job.shared.obtain()))
    return run.build(settings)


def run_sweep(settings: Settings) -> Results:
    return run_comparison(Sweep(settings))
