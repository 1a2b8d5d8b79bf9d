"""Made-up results of a sweep for the tests of the tables: the paper's numbers with a shift, in a real store."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eva_lightning.methods.keys import MethodKey
from eva_lightning.vision.data.tasks import TASKS
from experiments.vtab.grid import PAPER, Point
from experiments.vtab.jobs import Job
from experiments.vtab.run import Settings
from experiments.vtab.store_writer import held_store
from experiments.vtab.table_paper import HEADINGS, paper_line


def job(method: str, task: str, seed: int, point: Point | None = None, phase: Any = "final", **settings: Any) -> Job:
    """A run of a sweep with the paper's settings but for `settings`."""
    key = MethodKey.parse(method)
    base = replace(Settings("data", task), **settings)
    return Job.of(base, key, task, phase, point or Point(1e-3, 8 if key.adapts else None), seed, 0)


def metrics(run: Job, accuracy: float, **more: Any) -> dict[str, Any]:
    """What the run leaves, as far as tables look at it."""
    settings = run.settings
    shared = {
        "task": settings.task, "group": TASKS[settings.task].group, "model": settings.model,
        "weights": settings.weights, "method": run.key.method, "lr": run.point.lr, "seed": settings.seed,
        "epochs": settings.epochs, "image_size": settings.image_size, "train_split": settings.split,
        "evaluation_split": "test" if run.phase == "final" else "val200", "limited": False, "official_sizes": True,
        "accuracy": accuracy, "loss": 1.0, "train_seconds": 10.0,
    }  # fmt: skip
    if run.key.adapts:
        shared["rank"] = run.point.rank
    if run.key.rho is not None:
        shared["rho"] = run.key.rho
    return {**shared, **more}


def fill(store: Path, runs: Iterable[tuple[Job, dict[str, Any] | None]]) -> None:
    """Add rows to a store: done with these metrics, pending for None."""
    with held_store(store) as writer:
        writer._writes.execute("PRAGMA synchronous = OFF")  # hundreds of transactions that need not survive
        known = list(runs)
        writer.add(run.row() for run, _ in known)
        for run, found in known:
            if found is not None:
                assert writer.claim(run.run_id)
                writer.finish(run.run_id, found)


def sweep_like(
    methods: Sequence[str], tasks: Iterable[str] = HEADINGS, seeds: int = 5, shift: float = 0.0, **settings: Any
) -> list[tuple[Job, dict[str, Any]]]:
    """Final runs whose accuracies scatter around the paper's plus `shift` (of LoRA for methods it lacks)."""
    generator = np.random.default_rng(0)
    runs = []
    for method, task, seed in itertools.product(methods, tasks, range(seeds)):
        printed = paper_line(MethodKey.parse(method).method)
        line = printed if printed is not None and printed.samples else paper_line("lora")
        assert line is not None
        sample = line.samples[task]
        noise = min(sample.std or 0.0, 2.0) * generator.standard_normal()
        run = job(method, task, seed, **settings)
        runs.append((run, metrics(run, float(np.clip(sample.mean + shift + noise, 0, 100)) / 100)))
    return runs


def tuning_like(
    methods: Sequence[str], tasks: Iterable[str], points: Sequence[Point] | None = None, seeds: int = 3
) -> list[Any]:
    """Tuning runs over `points`, or over the paper's."""
    runs = []
    for method, task in itertools.product(methods, tasks):
        for point in points or PAPER.points(MethodKey.parse(method).adapts):
            tuning = [job(method, task, seed, point, "tune") for seed in range(seeds)]
            runs += [(run, metrics(run, 0.5)) for run in tuning]
    return runs
