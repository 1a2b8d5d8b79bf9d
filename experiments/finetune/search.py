"""A learning rate, chosen by the loss of validation images: a comparison of one cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.finetune.run import build_job
from experiments.finetune.settings import LADDER, Settings
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results
from experiments.runner.jobs import Job, Point
from experiments.runner.options import RunnerOptions


class RateSearch(Comparison):
    """Trains at every rate of a grid, and beyond its edge where the best one lies there; test images are not read.

    Args:
        settings: Of the fine-tuning.
        images: Digest of its images.
    """

    name = "learning rates"
    modules = ("peft", "experiments.finetune.run")
    #: Its name among the choices.
    cell = "learning rate"

    def __init__(self, settings: Settings, images: str) -> None:
        self.settings = settings
        self.images = images
        output = Path(settings.output) / settings.run_name / "tuning"
        # one after another in this process, on the threads that it has
        self.options = RunnerOptions(
            output=str(output),
            workers=0,
            threads=torch.get_num_threads(),
            progress=settings.progress,
            retry_failed=True,
        )

    def cells(self) -> list[Cell]:
        points = [Point.of(lr=lr) for lr in sorted(set(self.settings.lrs))]
        return [Cell(self.cell, points, self._jobs, _none, extend=2, ladder=LADDER)]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Loss of the validation images, then what share of them is wrong."""
        return float(metrics["loss"]), -float(metrics["accuracy"])

    def in_words(self, score: tuple[float, ...]) -> str:
        return f"validation loss {score[0]:.4g}, accuracy {-score[1]:.1%}"

    def headline(self, metrics: Mapping[str, Any]) -> str:
        return self.in_words(self.score(metrics))

    def report(self, results: Results) -> None:
        """The choice has been said; the page shows all rates."""

    def _jobs(self, point: Point) -> list[Job]:
        lr = point.get("lr")
        run = self.settings.one_run(lr, self.images, evaluation="val", hold_out=True)
        return [Job(build_job, run, self.options.output, "tune", {"lr": lr}, f"learning rate {lr:g}")]


def _none(point: Point) -> list[Job]:
    return []
