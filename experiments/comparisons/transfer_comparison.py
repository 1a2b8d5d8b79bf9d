"""The transfer comparison as the runner takes it: what it needs, its runs, how long they take, its report."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.nn import functional as F

from eva_lightning.vision.module import ImageClassifier
from experiments.comparisons import transfer_report
from experiments.comparisons.report import REPORT_FILES
from experiments.comparisons.settings import Part, adapts, method_cells
from experiments.comparisons.timing import median_seconds, step_seconds
from experiments.comparisons.transfer import Recipe, Settings
from experiments.comparisons.transfer_data import TASK, Halves, decoded
from experiments.comparisons.transfer_model import CROPPED_FROM, IMAGE_SIZE, MODEL, Pretraining, pretrain
from experiments.comparisons.transfer_run import Run, build, halves, prepare
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results, run_comparison
from experiments.runner.jobs import PHASE_FOLDERS, Job, Phase, Point
from experiments.runner.run_folder import RunFolder

_LOGGER = logging.getLogger(__name__)

#: Seconds of a run besides steps and evaluations: building, EVA's streaming, Lightning's start.
_PER_RUN = 1.0


class Transfer(Comparison):
    """All methods fine-tune one small network, pre-trained on the other half of the classes.

    Args:
        settings: What to compare.
    """

    name = "transfer"
    modules = ("peft", "experiments.comparisons.transfer_run")
    files = (*REPORT_FILES, "curves.png", "differences.png")

    def __init__(self, settings: Settings) -> None:
        self.settings = self.options = settings

    @property
    def parts(self) -> Halves:
        """The images, by what they are for."""
        settings = self.settings
        return halves(settings.root, settings.split_seed, settings.train_images, settings.validation_images)

    @property
    def _recipe(self) -> Pretraining:
        return Pretraining(split_seed=self.settings.split_seed, epochs=self.settings.pretrain_epochs)

    def check(self) -> None:
        _ = self.parts

    def prepare(self) -> None:
        """Decode all images and pre-train, where that is not done yet."""
        settings, parts = self.settings, self.parts
        progress = settings.progress and sys.stdout.isatty()
        train = decoded(parts.pretraining, CROPPED_FROM, settings.cache, progress)
        held_out = decoded(parts.held_out, IMAGE_SIZE, settings.cache, progress)
        for split in (parts.train, parts.test, parts.tuning, parts.validation):
            decoded(split, IMAGE_SIZE, settings.cache, progress)
        if not settings.weights.is_file():
            _LOGGER.info("pre-training on %d images of %d classes", len(train), parts.classes[0])
        metrics = pretrain(self._recipe, parts.classes[0], train, held_out, settings.weights, progress)
        accuracy = metrics["evaluations"][-1]["accuracy"]
        _LOGGER.info("pre-trained: held-out accuracy %.1f%%, %.0f s", 100 * accuracy, metrics["seconds"])

    def cells(self) -> list[Cell]:
        return method_cells(self.settings, self._jobs)

    def _jobs(self, part: Part, phase: Phase, point: Point, seed: int) -> list[Job]:
        settings, method, lr = self.settings, part.method, point.get("lr")
        shared: dict[str, Any] = {item.name: getattr(settings, item.name) for item in fields(Recipe)}
        shared["eval_epochs"] = settings.evaluated_epochs if phase == "final" else (settings.epochs,)
        shared |= {"weights": str(settings.weights), "cache": str(settings.cache)}
        run = Run(**shared, method=method, phase=phase, lr=lr, seed=seed)
        rank = settings.rank if adapts(method) else None
        tags = {"task": TASK, "method": method, "rank": rank, "seed": seed, "lr": lr}
        text = f"{settings.labels[method]}, lr {lr:g}, seed {seed}"
        return [Job(build, run, settings.output, phase, tags, text, order=seed)]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Loss on the validation images after training."""
        return (float(metrics["evaluations"][-1]["loss"]),)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        last = metrics["evaluations"][-1]
        return f"loss {last['loss']:.4f}, accuracy {100 * last['accuracy']:.1f}%"

    def seconds(self) -> Callable[[Job], float]:
        """By steps and evaluations of a method of each kind, timed now."""
        speed = functools.cache(functools.partial(measure_speed, self.settings))
        images: dict[str, list[int]] = {
            phase: [len(split) for split in self.parts.of(phase)] for phase in PHASE_FOLDERS
        }

        def seconds(job: Job) -> float:
            run: Run = job.settings
            train, held_out = images[run.phase]
            step, evaluation = speed(kind_of(run.method))
            return train * run.epochs * step + held_out * len(run.eval_epochs) * evaluation + _PER_RUN

        return seconds

    def plan_notes(self) -> list[str]:
        """Images, and the pre-training that precedes the runs."""
        parts, settings = self.parts, self.settings
        epochs = f"{settings.pretrain_epochs} epochs{', finished' if settings.weights.is_file() else ''}"
        return [
            f"pre-training: {epochs} on {len(parts.pretraining)} images of {parts.classes[0]} classes",
            f"tuning: on {len(parts.tuning)} images, {len(parts.validation)} to choose by",
            f"comparison: on {len(parts.train)} images of {parts.classes[1]} classes, {len(parts.test)} to test on",
        ]

    def report(self, results: Results) -> None:
        pretraining = RunFolder(self.settings.weights.parent, self._recipe).result() or {}
        print(f"report: {transfer_report.write(self.settings, self.parts, pretraining, results)}")


def kind_of(method: str) -> str:
    """A method of the same cost, whose adapters are put in at once."""
    if method == "scratch":
        return "fft"
    if method in ("linear-random", "linear", "fft"):
        return method.removesuffix("-random")
    return "dora" if "dora" in method else "lora"


def measure_speed(settings: Settings, kind: str) -> tuple[float, float]:
    """Seconds per training image and per evaluated image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(settings.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(0, 50, (settings.batch_size,), generator=generator)
    module = ImageClassifier(MODEL, 50, IMAGE_SIZE)
    prepare(module, Run(method=kind, rank=settings.rank))
    step = step_seconds(module, lambda: F.cross_entropy(module(images), labels))
    with torch.no_grad():
        evaluation = median_seconds(lambda: module(images))
    return step / len(images), evaluation / len(images)


def run(settings: Settings) -> Results:
    return run_comparison(Transfer(settings))
