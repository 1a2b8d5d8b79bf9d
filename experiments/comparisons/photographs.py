"""Frozen features, LoRA and EVA on photographs: a pre-trained DINOv2 ViT-S/14 learns ten kinds of land use.

Every method has a learning rate of its own, tuned by one rule on images and seeds that the tables do not use; then all
train at equal rates, such as one that is below the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.files import digest, file_digest
from eva_lightning.methods import MethodKey
from eva_lightning.vision.backbone.backbone_cache import reuse_backbones
from eva_lightning.vision.data.splits import TaskData, open_task
from experiments.comparisons import photographs_run
from experiments.comparisons.by_epoch import EpochsCompared, show_comparison
from experiments.comparisons.photographs_samples import Samples, samples
from experiments.comparisons.photographs_settings import OneRun, Recipe, Settings
from experiments.comparisons.tuned import no_jobs
from experiments.report import page
from experiments.report.epochs import EpochComparison, Pairs, compare, label
from experiments.report.gradients import gradient_figures
from experiments.report.ranks import decomposition_figures
from experiments.report.terminal import say
from experiments.runner.cells import Cell
from experiments.runner.comparison import Results
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.worker import WorkerOptions

__all__ = ["TUNING_SEEDS", "Photographs", "Settings"]

TUNING_SEEDS = 2
PROBE = "linear"
#: Methods that take EVA apart: differences of EVA to them are shown besides those to LoRA.
CONTROLS = ("orthonormal", "eva-lora-norm")
#: Training and validation images are those of the folder's own split; test images take no part in tuning.
_TRAINED_ON = "train800"


class Photographs(EpochsCompared):
    """The comparison; see :class:`~experiments.comparisons.tuned.TunedComparison`."""

    name = "photographs"
    modules = ("peft", "experiments.comparisons.photographs_run")
    packages = photographs_run.PACKAGES
    header = "Settings of a comparison on photographs."
    tune_command = "python -m experiments.demo --parts vision --tune"
    options: Settings

    def __init__(self, options: Settings, command: str = "") -> None:
        self.methods = options.trained
        self.evaluated = options.shown
        super().__init__(options, command)
        self._code = photographs_run.code_of_runs()
        file = Path(options.weights)
        self._weights_digest = file_digest(file)[:16] if file.is_file() else options.weights

    def check(self) -> None:
        """The images must be there."""
        _ = self._data

    def worker_options(self) -> WorkerOptions:
        """The network is read once per process."""
        return WorkerOptions(self.options.threads_per_run(), self.modules, reuse_backbones)

    def final_cells(self) -> list[Cell]:
        """One for frozen features, one per method at its rate, and one per method and equal rate."""
        probe = [Cell(PROBE, [], no_jobs, lambda point: [self._probe_job()], Point.of())]
        cells = [self.final_cell(method, lr) for method, lr in self.rates.items()]
        return [*(probe if self.options.has_probe else ()), *cells, *self._equal_cells()]

    def jobs(self, method: str, lr: float, phase: Phase) -> list[Job]:
        """One run per seed, to the end."""
        seeds = self.tuning_seeds if phase == "tune" else range(self.options.seeds)
        return [self._job(method, lr, seed, phase) for seed in seeds]

    def look(self, results: Callable[[], Results]) -> None:
        """Show the first complete set of methods."""
        if self.first_look is None or self.options.tune:
            return
        runs = results().runs
        tuned = self._tuned(runs) if len(runs) else runs
        if len(tuned) and set(self.options.methods) <= set(tuned.loc[tuned["seed"] == 0, "method"]):
            self.first_look(self._section(runs, is_first=True))
            self.first_look = None

    def report_runs(self, runs: pd.DataFrame) -> page.Section:
        """Print the tables, and return the section."""
        say(f"Weights: {self.options.origin or self.options.weights}.")
        show_comparison(self._compared(self._tuned(runs)), "At the learning rate tuned for each method")
        for heading, comparison in self._at_equal_rates(runs):
            show_comparison(comparison, heading)
        say("", *self.how_tuned().sentences)
        if shown := self._samples(runs):
            say("", shown.sentence)
        return self._section(runs)

    def tuning_record(self) -> dict[str, Any]:
        """On what, and with which weights."""
        return {**super().tuning_record(), "split": "val200", "weights": self.options.origin}

    def _section(self, runs: pd.DataFrame, is_first: bool = False) -> page.Section:
        options, tuned = self.options, self._tuned(runs)
        compared, origin = self._compared(tuned), options.origin or options.weights
        best = next((m for m in ("eva", "eva:1") if m in set(tuned["method"])), "")
        redistributed = tuned[tuned["method"] == best].sort_values("seed")
        adapted = tuned[tuned["method"].map(lambda key: MethodKey.parse(key).adapts)]
        verdict = (*compared.verdicts, compared.headline, f"Weights: {origin}.")
        body = page.render(
            "photographs.html",
            options=options,
            classes=self._data.task.classes,
            methods=page.enumerated([label(method) for method in options.methods]),
            origin=origin,
            is_first=is_first,
            facts=self._facts(runs),
            tuned=compared,
            equal=self._at_equal_rates(runs),
            found=decomposition_figures(list(redistributed["eva"]), options.rank, "model.blocks.") if best else [],
            gradients=gradient_figures(adapted),
            samples=self._samples(runs),
            tuning=self.how_tuned(),
            command=self.command,
        )
        first = ("A first look: one seed of every method, and more are under way.",) if is_first else ()
        return page.Section("EVA on photographs", body, (*first, *verdict))

    @cached_property
    def _data(self) -> TaskData:
        options = self.options
        return open_task(options.root, options.task, _TRAINED_ON, None, options.test_images, "test")

    @cached_property
    def _images_digest(self) -> str:
        data = self._data
        splits = [data.train, data.evaluation, open_task(self.options.root, self.options.task, _TRAINED_ON).evaluation]
        return digest([[path, file_digest(split.folder / path)] for split in splits for path in split.paths])

    def _equal_cells(self) -> Iterator[Cell]:
        options = self.options
        stop = None if options.shown_early == options.shown else options.equal_epochs
        for lr in options.equal_rates:
            for method in options.equal_methods or options.trained:
                if self.rates[method] != lr:  # else its runs are there, to the end
                    jobs = [self._job(method, lr, seed, "final", stop) for seed in range(options.seeds)]
                    yield Cell(f"{method} at {lr:g}, equal", [], no_jobs, lambda point, jobs=jobs: jobs, Point.of())  # type: ignore[misc]

    def _job(self, method: str, lr: float, seed: int, phase: Phase, stop: int | None = None) -> Job:
        options = self.options
        run = self._run(
            method=method,
            lr=lr,
            seed=seed,
            evaluate_on="val200" if phase == "tune" else "test",
            evaluated=options.shown if stop is None else options.shown_early,
            stop_after=stop,
        )
        tags = {"method": method, "lr": lr, "seed": seed, "stop": stop or options.epochs}
        text = f"{label(method)}, learning rate {lr:g}, seed {seed}"
        # seed by seed, so that an interruption leaves pairs
        return Job(photographs_run.build, run, options.output, phase, tags, text, order=seed)

    def _probe_job(self) -> Job:
        run = self._run(method=PROBE, evaluated=(self.options.epochs,))
        tags = {"method": PROBE, "lr": 0.0, "seed": 0, "stop": self.options.epochs}
        return Job(photographs_run.build, run, self.options.output, "final", tags, "frozen features")

    def _run(self, **own: Any) -> OneRun:
        shared = {item.name: getattr(self.options, item.name) for item in fields(Recipe)}
        digests = {"weights_digest": self._weights_digest, "images": self._images_digest, "code": self._code}
        return OneRun(**{**shared, **digests, "weights": self.options.weights, **own})

    def _tuned(self, runs: pd.DataFrame) -> pd.DataFrame:
        """The runs to the end at the tuned rates, and frozen features."""
        return runs[
            [
                row.method == PROBE or (row.lr == self.rates[row.method] and row.stop == self.options.epochs)
                for row in runs.itertuples()
            ]
        ]

    def _at_equal_rates(self, runs: pd.DataFrame) -> list[tuple[str, EpochComparison]]:
        """A heading and a comparison for each equal rate of which there are runs."""
        options, found = self.options, []
        epochs, methods = options.shown_early, options.equal_methods or options.trained
        early = "" if epochs == options.shown else f", the first {epochs[-1]} of {options.epochs} epochs"
        for lr in options.equal_rates:
            there = runs[(runs["lr"] == lr) & runs["method"].isin(methods)]
            if set(there["method"]) >= {"lora"} and there["method"].nunique() > 1:
                heading = f"At the same learning rate, {lr:g}{early}"
                found.append((heading, self._compared(_until(there, epochs))))
        return found

    def _compared(self, runs: pd.DataFrame) -> EpochComparison:
        found = compare(runs, self._pairs(set(runs["method"])))
        notes = (*found.results.notes, f"Weights: {self.options.origin or self.options.weights}.")
        return replace(found, results=replace(found.results, notes=notes))

    def _pairs(self, there: set[str]) -> Pairs:
        """Every method with LoRA, and EVA with what takes it apart."""
        trained = [method for method in self.options.trained if method in there]
        controls = [method for method in trained if MethodKey.parse(method).method in CONTROLS]
        whole = [method for method in trained if MethodKey.parse(method).method == "eva"]
        pairs = [(method, "lora") for method in trained if method != "lora"]
        return [*pairs, *((method, control) for method in whole for control in controls)]

    def _samples(self, runs: pd.DataFrame) -> Samples | None:
        tuned = self._tuned(runs)
        first = tuned[tuned["seed"] == 0].set_index("method")
        best = next((method for method in ("eva", "eva:1") if method in first.index), None)
        if best is None or PROBE not in first.index:
            return None
        before, after = (first.loc[method, "predicted"] for method in (PROBE, best))
        names = ("logistic regression on the frozen features", f"fine-tuned by {label(best)}")
        return samples(self._data, before, after, names)

    def _facts(self, runs: pd.DataFrame) -> dict[str, str]:
        options, data = self.options, self._data
        facts = {
            "Starting model": f"{options.model}; {options.origin or options.weights}",
            "Images": f"{options.task}, {options.image_size} pixels: {data.task.classes} classes, "
            f"{len(data.train)} images to train and {len(data.evaluation)} to test; learning rates and the penalty of "
            "logistic regression are chosen on other, validation images",
            "Training": f"{options.epochs} epochs, batches of {options.batch_size}, r = {options.rank}, AdamW, "
            "cosine decay",
            "Seeds": f"{page.counted(options.seeds, 'seed')}, from 0: each draws the head, the batch order and LoRA's "
            "random matrices; the images are the same",
        }
        return self.facts(facts, list(runs["path"]))


def _until(runs: pd.DataFrame, epochs: tuple[int, ...]) -> pd.DataFrame:
    """Runs as they were after these epochs; of a method's run that was stopped and one to the end, the former."""
    rows = []
    for _, group in runs.sort_values("stop").groupby(["method", "seed"], sort=False):
        row = group.iloc[0].to_dict()
        places = [[int(epoch) for epoch in row["epochs"]].index(epoch) for epoch in epochs]
        rows.append({**row, **{name: [row[name][i] for i in places] for name in ("epochs", "loss", "accuracy")}})
    return pd.DataFrame(rows)
