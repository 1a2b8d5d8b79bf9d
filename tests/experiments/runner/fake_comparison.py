"""A tiny comparison without training: python -m tests.experiments.runner.fake_comparison --output DIR."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.runner.cells import Cell
from experiments.runner.command import SettingsCommand
from experiments.runner.comparison import Comparison, run_comparison
from experiments.runner.jobs import PHASE_FOLDERS, Job, Phase, Point
from experiments.runner.options import RunnerOptions
from experiments.runner.results import Results
from experiments.runner.run_folder import RunFolder, Work
from experiments.runner.settings import Role, option


@dataclass(frozen=True)
class RunSettings:
    """What one run is asked to do."""

    method: str = option("lora", "method", Role.RESULT | Role.PER_RUN)
    lr: float = option(1e-3, "learning rate", Role.RESULT | Role.PER_RUN)
    seed: int = option(0, "seed", Role.RESULT | Role.PER_RUN)
    steps: int = option(100, "steps", Role.RESULT)
    wait: float = option(0.0, "seconds to wait", Role.PLACE)
    trouble: str = option("", "folder whose files say what goes wrong", Role.PLACE)


@dataclass(frozen=True, kw_only=True)
class Settings(RunnerOptions):
    """What is compared."""

    methods: tuple[str, ...] = option(("lora", "eva"), "methods", Role.SELECTION)
    lrs: tuple[float, ...] = option((1e-3, 1e-2), "learning rates", Role.SELECTION)
    seeds: int = option(2, "final seeds", Role.SELECTION, at_least=0)
    tune_seeds: int = option(2, "tuning seeds", Role.SELECTION, at_least=1)
    steps: int = option(100, "steps", Role.RESULT)
    extend: int = option(0, "rates to add", Role.SELECTION)
    wait: float = option(0.0, "seconds to wait", Role.PLACE)
    workers: int | None = option(0, "processes", Role.PLACE, at_least=0)
    threads: int | None = option(1, "threads", Role.PLACE, at_least=1)

    @property
    def uses_gpus(self) -> bool:
        return False


#: Best learning rate of each method.
BEST = {"lora": 1e-2, "eva": 1e-3}


def build(job: Job) -> Work:
    """Checks go here, then what the work needs."""
    trouble = Path(job.settings.trouble) / f"{job.settings.method}-{job.phase}"
    if trouble.is_file():
        exec(trouble.read_text())
    return work


def work(folder: RunFolder) -> dict[str, Any]:
    """Pretend to train: a loss that is least at the method's own learning rate."""
    settings = folder.settings
    time.sleep(settings.wait)
    loss = abs(settings.lr - BEST[settings.method]) + settings.seed / 1e6
    return {"loss": loss, "pid": os.getpid()}


class Fake(Comparison):
    """Two methods, tuned and compared."""

    name = "fake"

    def __init__(self, settings: Settings) -> None:
        self.options = self.settings = settings

    def cells(self) -> list[Cell]:
        settings = self.settings
        base = RunSettings(steps=settings.steps, wait=settings.wait, trouble=f"{settings.output}-trouble")

        def jobs(method: str, phase: Any, seeds: range) -> Callable[[Point], list[Job]]:
            return lambda point: [
                Job(
                    build=build,
                    settings=replace(base, method=method, lr=point.get("lr"), seed=seed),
                    output=settings.output,
                    phase=phase,
                    tags={"method": method, "seed": seed, **point.as_dict()},
                    text=f"{method}, {point}, seed {seed}, {phase}",
                )
                for seed in seeds
            ]

        return [
            Cell(
                name=method,
                points=[Point.of(lr=lr) for lr in settings.lrs],
                tune=jobs(method, "tune", range(100, 100 + settings.tune_seeds)),
                final=jobs(method, "final", range(settings.seeds)),
                extend=settings.extend,
                ladder=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
            )
            for method in settings.methods
        ]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        return (metrics["loss"],)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        return f"loss {metrics['loss']:.3g}"

    def seconds(self) -> Callable[[Job], float]:
        return lambda job: 60.0

    def plan_notes(self) -> list[str]:
        return ["measured: nothing"]

    def report(self, results: Results) -> None:
        file = Path(self.settings.output) / "report.md"
        file.write_text(results.runs[["method", "lr", "seed", "loss"]].to_markdown())
        print(f"the report: {file}")


def run(settings: Settings) -> Results:
    """The comparison that `settings` ask for."""
    return run_comparison(Fake(settings))


COMMAND = SettingsCommand(Settings, "fake", "A tiny comparison.", "tests.experiments.runner.fake_comparison:run")
command_line = COMMAND.command_line


def parse(args: Sequence[str] | None = None) -> Fake:
    """From a command line."""
    return Fake(COMMAND.parse(args))


class FinishedRun(NamedTuple):
    """A finished run, read from its folder."""

    path: Path
    settings: dict[str, Any]
    metrics: dict[str, Any]


def finished_runs(output: Path, phase: Phase = "final") -> Iterator[FinishedRun]:
    """All finished runs below OUTPUT."""
    for file in sorted((output / PHASE_FOLDERS[phase]).glob("*/metrics.json")):
        settings = yaml.safe_load(file.with_name("config.yaml").read_text(encoding="utf-8"))
        yield FinishedRun(file.parent, settings, json.loads(file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    from tests.experiments.runner import fake_comparison

    sys.exit(fake_comparison.command_line())
