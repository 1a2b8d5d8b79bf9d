"""Made-up results of a sweep for the tests of the tables: the paper's numbers with a shift, as finished runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eva_lightning.methods import MethodKey
from experiments.runner.jobs import Job, Phase, Point
from experiments.vtab.grid import PAPER
from experiments.vtab.sweep import make_job
from experiments.vtab.sweep_settings import Settings
from experiments.vtab.table_paper import HEADINGS, paper_lines
from experiments.vtab.table_results import run_row
from tests.experiments.vtab.sweep_fakes import fake_metrics

Run = tuple[Job, dict[str, Any]]


def job(method: str, task: str, seed: int, point: Point | None = None, phase: Phase = "final", **changes: Any) -> Job:
    """A run of a sweep with the paper's settings but for `changes`."""
    key = MethodKey.parse(method)
    if point is not None and point.get("rho") is not None:
        key = MethodKey(key.method, point.get("rho"))
    point = point or Point.of(lr=1e-3, rank=8 if key.adapts else None)
    return make_job(Settings(methods=(method,), **changes), task, key, phase, point, seed)


def metrics(run: Job, accuracy: float, **more: Any) -> dict[str, Any]:
    """What the run leaves, with the official sizes of data."""
    return fake_metrics(run, accuracy, **more)


def frame(runs: Iterable[Run]) -> pd.DataFrame:
    """The runs as they would be read from their folders."""
    return pd.DataFrame([run_row(found, f"folder {run.id}") for run, found in runs])


def write(root: Path, runs: Iterable[Run]) -> list[Path]:
    """Folders of the runs below `root`, as far as tables look at them."""
    folders = []
    for run, found in runs:
        folder = root / run.id
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(found))
        folders.append(folder)
    return folders


def sweep_like(
    methods: Sequence[str], tasks: Iterable[str] = HEADINGS, seeds: int = 5, shift: float = 0.0, **changes: Any
) -> list[Run]:
    """Final runs whose accuracies scatter around the paper's plus `shift` (of LoRA for methods it lacks)."""
    generator = np.random.default_rng(0)
    runs = []
    for method, task in itertools.product(methods, tasks):
        line = paper_lines().get(MethodKey.parse(method).method)
        line = line if line is not None and line.samples else paper_lines()["lora"]
        sample = line.samples[task]
        for seed in range(seeds):
            noise = min(sample.std or 0.0, 2.0) * generator.standard_normal()
            run = job(method, task, seed, **changes)
            runs.append((run, metrics(run, float(np.clip(sample.mean + shift + noise, 0, 100)) / 100)))
    return runs


def tuned(runs: Iterable[Run], **how: Any) -> list[Run]:
    """The runs, and for each method and task of theirs tuning over the paper's grid."""
    runs = list(runs)
    places = dict.fromkeys((run.tags["method"], run.settings.task) for run, _ in runs)
    return [*runs, *(trial for method, task in places for trial in tuning_like(method, task, **how))]


def tuning_like(method: str, task: str, points: Sequence[Point] | None = None, seeds: int = 3) -> list[Run]:
    """Tuning runs over `points`, or over the paper's."""
    key = MethodKey.parse(method)
    points = points or PAPER.points(key.adapts, key.entry.searches_rho and ":" not in method)
    trials = [job(method, task, seed, point, "tune") for point in points for seed in range(seeds)]
    return [(trial, metrics(trial, 0.5)) for trial in trials]
