"""What the tests of the sweep share: tiny data, a command line, and a pool that runs in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.runner.comparison import Results, run_comparison
from experiments.runner.jobs import Job, Outcome
from experiments.vtab.run import experiment
from experiments.vtab.sweep import Sweep
from experiments.vtab.sweep_settings import parse
from tests.eva_lightning.vision.fakes import make_task
from tests.experiments.runner.fake_pool import FakePool

COUNTS = {"train800": 8, "val200": 8, "test": 12}


def make_tasks(root: Path, tasks: Sequence[str] = ("kitti", "dmlab")) -> None:
    """The tasks in miniature."""
    for task in tasks:
        make_task(root, task, {"kitti": 4, "dmlab": 6, "eurosat": 10}[task], size=32, counts=COUNTS)


def words(root: Path, output: Path, extra: str = "") -> list[str]:
    """A command line for tiny runs on a CPU; later options win."""
    text = (
        f"--root {root} --output {output} --model test_vit --weights none --image-size 32 --epochs 1 --batch-size 8 "
        f"--accelerator cpu --threads 1 {extra}"
    )
    return text.split()


def pretend(accuracy: Callable[[Job], float] = lambda job: 0.5) -> Callable[[Job], Outcome]:
    """Runs without training, which leave the folders of finished ones."""

    def work(job: Job) -> Outcome:
        metrics = fake_metrics(job, accuracy(job))
        job.folder.start()
        job.folder.finish(metrics)
        return Outcome(job.id, "done", metrics)

    return work


def fake_metrics(job: Job, accuracy: float, **more: Any) -> dict[str, Any]:
    """What a run leaves, as far as choices and tables look at it."""
    settings = job.settings
    names = ("task", "model", "method", "lr", "seed", *(["rank"] if settings.key.adapts else []))
    rho = {} if settings.key.rho is None else {"rho": settings.rho}
    return {
        **{name: getattr(settings, name) for name in names}, **rho, "experiment": experiment(settings),
        "evaluation_split": "test" if job.phase == "final" else "val200", "limited": False, "official_sizes": True,
        "accuracy": accuracy, "loss": 1.0, "train_seconds": 0.1, **more,
    }  # fmt: skip


def sweep(line: Sequence[str], pool: FakePool | None = None) -> Results:
    """The sweep of a command line, in this process."""
    return run_comparison(Sweep(parse(line)), pool=lambda: pool or FakePool())


def all_runs(results: Results) -> pd.DataFrame:
    """Tuning and final runs."""
    return pd.concat([results.tuning.assign(phase="tune"), results.runs.assign(phase="final")], ignore_index=True)
