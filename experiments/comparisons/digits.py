"""EVA, LoRA and full fine-tuning on handwritten digits: a small ViT learns 0-4, then 200 labelled images of 5-9.

Every method has a learning rate of its own, tuned by one rule on images and seeds that the tables do not use; then all
methods with adapters train at a tenth of LoRA's, which is too low for the epochs they have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from eva_lightning import plots
from eva_lightning.methods import MethodKey
from eva_lightning.vision.digits import PIXEL_MEAN, PIXEL_STD, load_digits_split
from experiments.comparisons import digits_run
from experiments.comparisons.by_epoch import EpochsCompared, show_comparison
from experiments.comparisons.digits_run import CLASSES, PRETRAINING_CLASSES, RunSettings
from experiments.comparisons.tuned import TunedSettings
from experiments.report import page
from experiments.report.epochs import compare, label
from experiments.report.ranks import decomposition_figures
from experiments.report.terminal import say
from experiments.runner.cells import Cell
from experiments.runner.jobs import Job, Phase
from experiments.runner.settings import Role, option

METHODS = ("fft", "lora", "eva:1", "eva")
ADAPTERS = tuple(method for method in METHODS if MethodKey.parse(method).adapts)
TUNING_SEEDS = 5
LOWER = 10  # the second comparison divides LoRA's tuned rate by this


@dataclass(frozen=True, kw_only=True)
class Settings(TunedSettings):
    """Settings of the comparison; the layout of ``configs/digits.yaml``."""

    seeds: int = option(4, "runs per method", Role.SELECTION, at_least=1)
    epochs: int = option(10, "fine-tuning epochs", Role.RESULT, at_least=1)
    labels: int = option(200, "labelled images of 5-9", Role.RESULT, at_least=1)
    pretrain_epochs: int = option(30, "pre-training epochs", Role.RESULT, at_least=1)
    rank: int = option(4, "LoRA's rank and EVA's mean rank", Role.RESULT, at_least=1)
    lrs: tuple[float, ...] = option((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "to choose from", Role.SELECTION, above=0)


class Digits(EpochsCompared):
    """The comparison; see :class:`~experiments.comparisons.tuned.TunedComparison`."""

    name = "digits"
    modules = ("peft", "experiments.comparisons.digits_run")
    methods = METHODS
    packages = digits_run.PACKAGES
    header = "The demo's digits part, for where no weights can be had."
    tune_command = "python -m experiments.demo --parts digits --tune"
    options: Settings

    def __init__(self, options: Settings, command: str = "") -> None:
        self.evaluated = tuple(range(1, options.epochs + 1))
        super().__init__(options, command)
        self._pretrained = digits_run.pretrained_folder(options.output, options.pretrain_epochs)
        self._code = digits_run.code_of_runs()

    @property
    def lower_rate(self) -> float:
        """Learning rate of the second comparison."""
        return self.rates["lora"] / LOWER

    def prepare(self) -> None:
        """Pre-train the model that every method starts from."""
        known = self._pretrained.result()
        if known is None:
            say(f"Pre-training a small ViT on the digits 0-4 ({self.options.pretrain_epochs} epochs) ...")
        found = digits_run.pretrain_once(self._pretrained)
        origin = "trained in" if known is None else "known from an earlier call, where training took"
        say(f"Pre-trained model: {found['accuracy']:.1%} held out, {origin} {found['seconds']:.0f} s.")

    def final_cells(self) -> list[Cell]:
        """One per method, and one per method with adapters at the lower rate."""
        pairs = [*self.rates.items(), *((method, self.lower_rate) for method in ADAPTERS)]
        return [self.final_cell(method, lr) for method, lr in dict.fromkeys(pairs)]

    def jobs(self, method: str, lr: float, phase: Phase) -> list[Job]:
        """One run per seed."""
        options = self.options
        jobs = []
        for seed in self.tuning_seeds if phase == "tune" else range(options.seeds):
            settings = RunSettings(
                method=method,
                lr=lr,
                seed=seed,
                weights=str(digits_run.weights_in(self._pretrained)),
                labels=options.labels,
                epochs=options.epochs,
                rank=options.rank,
                evaluate_on="tune" if phase == "tune" else "test",
                code=self._code,
            )
            tags = {"method": method, "lr": lr, "seed": seed}
            text = f"{label(method)}, learning rate {lr:g}, seed {seed}"
            # seed by seed, so that an interruption leaves pairs
            jobs.append(Job(digits_run.build, settings, options.output, phase, tags, text, order=seed))
        return jobs

    def report_runs(self, runs: pd.DataFrame) -> page.Section:
        """Print the tables, and return the section."""
        tuned = compare(runs[[row.lr == self.rates[row.method] for row in runs.itertuples()]])
        lower = compare(runs[(runs["lr"] == self.lower_rate) & runs["method"].isin(ADAPTERS)])
        tuning = self.how_tuned()
        show_comparison(tuned, "At the learning rate tuned for each method")
        not_converged = f"At a tenth of LoRA's tuned rate ({self.lower_rate:g}), where training has not converged"
        show_comparison(lower, not_converged)
        say("", *tuning.sentences)
        eva = runs[(runs["method"] == "eva") & (runs["lr"] == self.rates["eva"])].sort_values("seed")
        body = page.render(
            "digits.html",
            options=self.options,
            facts=self._facts(runs),
            tuned=tuned,
            lower=lower,
            lower_rate=f"{self.lower_rate:g}",
            found=decomposition_figures(list(eva["eva"]), self.options.rank, "model.blocks."),
            samples=[_samples(PRETRAINING_CLASSES, "Pre-training"), _samples(CLASSES, "Fine-tuning")],
            tuning=tuning,
            command=self.command,
        )
        return page.Section("EVA on handwritten digits", body, (*tuned.verdicts, tuned.headline))

    def tuning_record(self) -> dict[str, Any]:
        """On what."""
        return {**super().tuning_record(), "labels": self.options.labels}

    def _facts(self, runs: pd.DataFrame) -> dict[str, str]:
        pretrained = self._pretrained.result() or {}
        known = (self._pretrained.path / "metrics.json").stat().st_mtime < self.started
        origin = "from an earlier call; training took" if known else "trained now in"
        facts = {
            "Seeds": f"{page.counted(self.options.seeds, 'seed')}, from 0: each draws the labels, the head, the batch "
            "order and LoRA's random matrices",
            "Starting model": f"{pretrained['accuracy']:.1%} held out on digits 0 to 4 after "
            f"{self.options.pretrain_epochs} epochs; {origin} {pretrained['seconds']:.0f} s",
        }
        return self.facts(facts, list(runs["path"]))


def _samples(classes: tuple[int, ...], what: str) -> page.Figure:
    """Four images of every class."""
    images, labels = load_digits_split(classes).train.tensors
    per_class = [(labels == i).nonzero().squeeze(1)[:4] for i in range(len(classes))]
    chosen = [int(per_class[i][row]) for row in range(4) for i in range(len(classes))]
    pixels = (images[chosen, 0] * PIXEL_STD + PIXEL_MEAN).numpy()
    captions = [str(classes[int(labels[i])]) for i in chosen]
    title = f"{what}: digits {classes[0]} to {classes[-1]}"
    return page.drawn(plots.image_grid(pixels, captions, columns=5, title=title), f"20 scans. {title}")
