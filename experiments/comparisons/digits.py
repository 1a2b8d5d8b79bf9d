"""EVA, LoRA and full fine-tuning on handwritten digits: a small ViT learns 0-4, then 200 labelled images of 5-9.

Every method has a learning rate of its own, tuned by one rule on images and seeds that the tables do not use; then all
methods with adapters train at a tenth of LoRA's, which is too low for the epochs they have.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from eva_lightning import plots
from eva_lightning.files import write_json
from eva_lightning.methods import MethodKey
from eva_lightning.vision.digits import PIXEL_MEAN, PIXEL_STD, load_digits_split
from experiments.comparisons import digits_run
from experiments.comparisons.digits_run import CLASSES, PRETRAINING_CLASSES, RunSettings
from experiments.report import learning_rates as rates
from experiments.report import page
from experiments.report.epochs import EARLY, EpochComparison, compare, label
from experiments.report.ranks import decomposition_figures
from experiments.report.terminal import say, show
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.options import RunnerOptions
from experiments.runner.settings import Role, option

METHODS = ("fft", "lora", "eva:1", "eva")
ADAPTERS = tuple(method for method in METHODS if MethodKey.parse(method).adapts)
FIRST_TUNING_SEED = 1000
TUNING_SEEDS = 5
LOWER = 10  # the second comparison divides LoRA's tuned rate by this
RULE = "highest mean accuracy after the last epoch on the tuning part, ties to the lower mean loss"
COMMAND = "python -m experiments.demo --parts vision --tune"


@dataclass(frozen=True, kw_only=True)
class Settings(RunnerOptions):
    """Settings of the comparison; the layout of ``configs/demo.yaml``."""

    seeds: int = option(10, "runs per method", Role.SELECTION, at_least=1)
    epochs: int = option(10, "fine-tuning epochs", Role.RESULT, at_least=1)
    labels: int = option(200, "labelled images of 5-9", Role.RESULT, at_least=1)
    pretrain_epochs: int = option(30, "pre-training epochs", Role.RESULT, at_least=1)
    rank: int = option(4, "LoRA's rank and EVA's mean rank", Role.RESULT, at_least=1)
    learning_rates: dict[str, float] | None = option(None, "learning rate of every method", Role.SELECTION)
    tuning: dict[str, Any] | None = option(None, "how they were chosen, as --tune writes it", Role.SELECTION)
    tune: str | None = option(None, "choose the learning rates and write them to this file", Role.SELECTION)
    lrs: tuple[float, ...] = option((3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "to choose from", Role.SELECTION, above=0)


class Digits(Comparison):
    """The comparison.

    Args:
        options: Its settings.
        command: The command that repeats it.

    Attributes:
        section: What a page says about it; set by :meth:`report`.
    """

    name = "digits"
    modules = ("peft", "experiments.comparisons.digits_run")

    def __init__(self, options: Settings, command: str = "") -> None:
        self.options: Settings = options
        self.section: Markup | None = None
        self._command = command
        self._started = time.time()
        self._pretrained = digits_run.pretrained_folder(options.output, options.pretrain_epochs)
        self._code = digits_run.code_of_runs()
        self._rates = {} if options.tune else rates.check_rates(options.learning_rates, METHODS)

    @property
    def lower_rate(self) -> float:
        """Learning rate of the second comparison."""
        return self._rates["lora"] / LOWER

    def prepare(self) -> None:
        """Pre-train the model that every method starts from."""
        known = self._pretrained.result()
        if known is None:
            say(f"Pre-training a small ViT on the digits 0-4 ({self.options.pretrain_epochs} epochs) ...")
        found = digits_run.pretrain_once(self._pretrained)
        origin = "trained in" if known is None else "known from an earlier call, where training took"
        say(f"Pre-trained model: {found['accuracy']:.1%} held out, {origin} {found['seconds']:.0f} s.")

    def cells(self) -> list[Cell]:
        """One per method, and one per method with adapters at the lower rate."""
        if self.options.tune:
            points = [Point.of(lr=lr) for lr in self.options.lrs]
            return [Cell(method, points, partial(self._tuning_jobs, method), _nothing) for method in METHODS]
        pairs = [*self._rates.items(), *((method, self.lower_rate) for method in ADAPTERS)]
        return [
            Cell(f"{method} at {lr:g}", [], _nothing, partial(self._final_jobs, method), Point.of(lr=lr))
            for method, lr in dict.fromkeys(pairs)
        ]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Accuracy, then loss, after the last epoch."""
        return -metrics["accuracy"][-1], metrics["loss"][-1]

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Accuracy."""
        return f"{metrics['accuracy'][-1]:.1%} held out"

    def report(self, results: Results) -> None:
        """Print the tables, write ``results.json``, and make the section."""
        if self.options.tune:
            self._report_tuning(results)
            return
        runs = results.runs
        tuned = compare(runs[[row.lr == self._rates[row.method] for row in runs.itertuples()]])
        lower = compare(runs[(runs["lr"] == self.lower_rate) & runs["method"].isin(ADAPTERS)])
        tuning = self._tuning()
        _show(tuned, "At the learning rate tuned for each method")
        _show(lower, f"At a tenth of LoRA's tuned rate ({self.lower_rate:g}), where training has not converged")
        say("", *tuning.sentences)
        write_json(Path(self.options.output) / "results.json", runs.to_dict("records"))
        eva = runs[(runs["method"] == "eva") & (runs["lr"] == self._rates["eva"])].sort_values("seed")
        self.section = page.render(
            "digits.html",
            options=self.options,
            facts=self._facts(runs),
            tuned=tuned,
            lower=lower,
            lower_rate=f"{self.lower_rate:g}",
            found=decomposition_figures(list(eva["eva"]), self.options.rank, "model.blocks."),
            samples=[_samples(PRETRAINING_CLASSES, "Pre-training"), _samples(CLASSES, "Fine-tuning")],
            tuning=tuning,
            tune_command=COMMAND,
            command=self._command,
        )

    def _final_jobs(self, method: str, point: Point) -> list[Job]:
        return [self._job(method, point.get("lr"), seed, "final") for seed in range(self.options.seeds)]

    def _tuning_jobs(self, method: str, point: Point) -> list[Job]:
        return [self._job(method, point.get("lr"), seed, "tune") for seed in self._tuning_seeds()]

    def _tuning_seeds(self) -> list[int]:
        return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.options.seeds))

    def _job(self, method: str, lr: float, seed: int, phase: Phase) -> Job:
        options = self.options
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
        return Job(digits_run.build, settings, options.output, phase, tags, text, order=seed)

    def _tuning(self) -> rates.Tuning:
        """How the learning rates were chosen."""
        chosen, known = rates.chosen_in_words(self._rates), self.options.tuning
        scores = rates.scores_of(known)
        if known is None or scores.empty:
            return rates.Tuning(chosen)
        epochs = {"early_loss": known["early_epoch"], "loss": known["epochs"]}
        return rates.Tuning(
            chosen=chosen,
            rule=known["rule"],
            seeds=rates.seeds_in_words(known["seeds"]),
            table=_scores_table(scores, self._rates),
            sentences=rates.equal_rate_sentences(scores, {name: f"after epoch {n}" for name, n in epochs.items()}),
            figures=[
                rates.sensitivity_figure(scores, name, f"Loss on the tuning part after epoch {epoch}")
                for name, epoch in epochs.items()
            ],
        )

    def _report_tuning(self, results: Results) -> None:
        options, runs = self.options, results.tuning
        early = min(EARLY[-1], options.epochs)
        last = {
            "accuracy": runs["accuracy"].str[-1],
            "loss": runs["loss"].str[-1],
            "early_loss": runs["loss"].str[early - 1],
        }
        means = rates.mean_scores(runs.assign(**last), list(last))
        chosen = rates.chosen_rates(results.choices)
        show(_scores_table(means, chosen))
        tuning = {
            "rule": RULE,
            "seeds": self._tuning_seeds(),
            "labels": options.labels,
            "epochs": options.epochs,
            "early_epoch": early,
            "scores": means.to_dict("records"),
        }
        header = f"# Learning rates of the demo's digits part, written by: {COMMAND}\n"
        rates.write_choice(Path(options.tune or ""), header, chosen, tuning)
        say(f"Learning rates written to {options.tune}.")

    def _facts(self, runs: pd.DataFrame) -> dict[str, str]:
        pretrained = self._pretrained.result() or {}
        known = (self._pretrained.path / "metrics.json").stat().st_mtime < self._started
        origin = "from an earlier call; training took" if known else "trained now in"
        return {
            "Machine": page.machine(),
            "Versions": ", ".join(f"{name} {version}" for name, version in page.versions(digits_run.PACKAGES).items()),
            "Seeds": f"{page.counted(self.options.seeds, 'seed')}, from 0: each draws the labels, the head, the batch "
            "order and LoRA's random matrices",
            "Starting model": f"{pretrained['accuracy']:.1%} held out on digits 0 to 4 after "
            f"{self.options.pretrain_epochs} epochs; {origin} {pretrained['seconds']:.0f} s",
            "Fine-tuning runs": page.finished_when(runs["path"], self._started),
            "Time of this call": f"{time.time() - self._started:.0f} s",
        }


def _nothing(point: Point) -> list[Job]:
    return []


def _show(comparison: EpochComparison, heading: str) -> None:
    say("", heading)
    show(comparison.results)
    if comparison.differences is not None:
        show(comparison.differences)
    say(*comparison.verdicts)


def _scores_table(scores: pd.DataFrame, chosen: Mapping[str, float]) -> page.Table:
    return rates.scores_table(
        scores, chosen, {"accuracy": ".1%", "loss": ".3f"}, "Mean accuracy and loss on the tuning part, last epoch"
    )


def _samples(classes: tuple[int, ...], what: str) -> page.Figure:
    """Four images of every class."""
    images, labels = load_digits_split(classes).train.tensors
    per_class = [(labels == i).nonzero().squeeze(1)[:4] for i in range(len(classes))]
    chosen = [int(per_class[i][row]) for row in range(4) for i in range(len(classes))]
    pixels = (images[chosen, 0] * PIXEL_STD + PIXEL_MEAN).numpy()
    captions = [str(classes[int(labels[i])]) for i in chosen]
    title = f"{what}: digits {classes[0]} to {classes[-1]}"
    return page.drawn(plots.image_grid(pixels, captions, columns=5, title=title), f"20 scans. {title}")
