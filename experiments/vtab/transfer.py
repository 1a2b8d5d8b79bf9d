"""All methods on real images without downloaded weights: ``python -m experiments.vtab transfer --root DIR``.

A small Vision Transformer is pre-trained on half of Caltech101's classes; then every method fine-tunes it on 1,000
images of the other half and is tested on the rest of that half, with the protocol of the EVA paper (section D.2)
scaled down. Learning rates are tuned for each method alone, by the loss on 200 of the 1,000 images after training on
the other 800, with seeds that the comparison does not use; the grid grows until the best rate lies inside.

Every run is a folder below OUTPUT/runs (OUTPUT/tuning for the tuning): a command that was ended anywhere continues with
the runs that are missing, and the same command on finished runs writes the report anew.
"""

from __future__ import annotations

import hashlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.methods.keys import METHOD_TRAITS
from experiments.runner.cli import in_terminal
from experiments.runner.processes import worker_pool
from experiments.runner.settings import option, parse_settings
from experiments.vtab.transfer_runs import BASELINES, Job, Variant, halves, run_all

_LOGGER = logging.getLogger("experiments.vtab.transfer")

#: Learning rates that a grid may grow to.
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

Rates = dict[str, float]
Scores = dict[str, dict[float, float]]


def _all_methods() -> str:
    words: list[str] = []
    for method in METHOD_TRAITS:
        words += ["eva:1", "eva:2"] if method == "eva" else [method]
    return ",".join([*BASELINES, *words])


@dataclass(frozen=True)
class Settings:
    """What to compare; the layout of ``configs/vtab/transfer.yaml``."""

    root: str = option("vtab-1k", "folder that holds VTAB-1K's caltech101 folder")
    methods: str = option(_all_methods(), "methods, EVA's ρ behind a colon; scratch and linear-random: not pre-trained")
    seeds: int = option(6, "seeds per method, from 0")
    rank: int = option(4, "LoRA rank; EVA's mean rank per layer, so that all share one budget")
    alpha: float = option(1.0, "LoRA's alpha; updates are scaled by alpha / rank")
    epochs: int = option(6, "epochs of fine-tuning")
    warmup_epochs: float = option(0.6, "epochs of linear warm-up")
    batch_size: int = option(64, "images per update")
    weight_decay: float = option(0.05, "AdamW's weight decay")
    looks: str = option("1,2,3", "epochs after which the test images are looked at, besides the last")
    rates: str | None = option(None, "learning rates, as lora=0.01,eva:2=0.01,...; the others are tuned")
    grid: str = option("3e-3,1e-2,3e-2", "learning rates to try first when tuning, with commas")
    extend: int = option(3, "most rates to add per method, beyond an edge of the grid that came out best")
    tune_seeds: int = option(1, "seeds of the tuning, from 100")
    train_images: int = option(1000, "images to fine-tune on")
    validation_images: int = option(200, "how many of them are for tuning")
    pretrain_epochs: int = option(60, "epochs of pre-training, on one core")
    split_seed: int = option(0, "which half of the classes, and which images")
    workers: int = option(2, "processes, of one thread each; 0 for none besides this one")
    output: str = option("runs/vtab-transfer", "folder for weights, runs and report")
    plan: bool = option(False, "measure the speed, say what there is to do and how long it takes, and stop")
    report: bool = option(False, "write the report of what is finished so far, and stop; also while runs go on")
    progress: bool = option(True, "show progress bars")

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("rank", 1), ("epochs", 1), ("batch_size", 1), ("extend", 0),
                            ("tune_seeds", 1), ("pretrain_epochs", 1), ("workers", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("alpha", "weight_decay", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        keys = [variant.key for variant in self.variants]
        if not keys or len(set(keys)) < len(keys):
            raise InputError(f"methods must be named, and differ, got {self.methods!r}")
        _ = self.learning_rates, self.look_epochs, self.given_rates

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The methods."""
        return tuple(Variant.parse(word) for word in self.methods.split(",") if word.strip())

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid to begin with, in ascending order."""
        try:
            rates = sorted({float(word) for word in self.grid.split(",") if word.strip()})
        except ValueError:
            raise InputError(f"grid must be numbers with commas between them, got {self.grid!r}") from None
        if not rates or not rates[0] > 0:
            raise InputError(f"grid must be learning rates above 0, got {self.grid!r}")
        return tuple(rates)

    @property
    def look_epochs(self) -> tuple[int, ...]:
        """Epochs after which held-out images are looked at, the last included."""
        try:
            epochs = {int(word) for word in self.looks.split(",") if word.strip()}
        except ValueError:
            raise InputError(f"looks must be epochs with commas between them, got {self.looks!r}") from None
        if epochs and min(epochs) < 1:
            raise InputError(f"looks must be epochs from 1, got {self.looks!r}")
        return tuple(sorted({epoch for epoch in epochs if epoch < self.epochs} | {self.epochs}))

    @property
    def given_rates(self) -> Rates:
        """Learning rates by method, of those that are given."""
        rates = {}
        for word in (self.rates or "").split(","):
            if not word.strip():
                continue
            name, _, value = word.partition("=")
            key = Variant.parse(name).key
            try:
                rates[key] = float(value)
            except ValueError:
                raise InputError(f"rates must be written as lora=0.01,eva:1=0.01, got {word.strip()!r}") from None
        return rates

    def job(self, variant: Variant, phase: Literal["tuning", "final"], lr: float, seed: int, digest: str) -> Job:
        """One run."""
        return Job(
            variant=variant.key,
            phase=phase,
            lr=lr,
            seed=seed,
            epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            rank=self.rank,
            alpha=self.alpha,
            looks=self.look_epochs if phase == "final" else (self.epochs,),
            split_seed=self.split_seed,
            train_images=self.train_images,
            validation_images=self.validation_images,
            digest=digest,
            root=self.root,
            output=self.output,
            weights=str(self.weights),
        )

    @property
    def weights(self) -> Path:
        """File of the pre-trained weights."""
        return Path(self.output) / "pretraining" / "backbone.safetensors"


class Stage:
    """Runs jobs, or with ``--report`` takes what is finished, and keeps what failed.

    Attributes:
        failures: Text of a job and what went wrong.
        seconds: Processor seconds of all finished runs.
    """

    def __init__(self, settings: Settings, pool: ProcessPoolExecutor | None) -> None:
        self.settings = settings
        self.pool = pool
        self.failures: list[tuple[str, str]] = []
        self.seconds = 0.0

    def __call__(self, title: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Metrics of all `jobs` that did not fail, in their order."""
        done = {job: job.folder.result() for job in jobs}
        todo = [] if self.settings.report else [job for job in jobs if done[job] is None]
        if self.settings.report or len(todo) < len(jobs):
            finished = sum(metrics is not None for metrics in done.values())
            _LOGGER.info("%s: %d of %d runs are finished", title, finished, len(jobs))
        started = time.perf_counter()
        with _bar(self.settings, title, len(todo)) as advance:
            for number, outcome in enumerate(run_all(todo, self.pool), 1):
                left = (time.perf_counter() - started) / number * (len(todo) - number) / 60
                place, text = f"{title} {number}/{len(todo)}", outcome.job.text
                done[outcome.job] = outcome.metrics
                if outcome.metrics is None:
                    self.failures.append((text, outcome.error or ""))
                    _LOGGER.warning("%s: %s failed: %s", place, text, outcome.error)
                else:
                    last = outcome.metrics["looks"][-1]
                    _LOGGER.info(
                        "%s: %s: loss %.4f, accuracy %.1f%%; %.0f min left",
                        place, text, last["loss"], 100 * last["accuracy"], left,
                    )  # fmt: skip
                advance()
        results = [metrics for job in jobs if (metrics := done[job]) is not None]
        self.seconds += sum(float(metrics["seconds"]) for metrics in results)
        return results


def tune(settings: Settings, digest: str, stage: Callable[[str, Sequence[Job]], list[dict[str, Any]]]) -> Scores:
    """Loss of every rate that was tried, by method.

    All methods begin with the same grid. Where the best rate is at its edge, the next one beyond is tried, at most
    ``extend`` times, so that every method's optimum is looked for where it is.
    """
    tuned = [variant for variant in settings.variants if variant.key not in settings.given_rates]
    tried = {variant.key: list(settings.learning_rates) for variant in tuned}
    results: list[dict[str, Any]] = []
    new = {key: list(rates) for key, rates in tried.items()}
    for turn in range(settings.extend + 1):
        jobs = [
            settings.job(variant, "tuning", lr, seed, digest)
            for seed in range(100, 100 + settings.tune_seeds)
            for variant in tuned
            for lr in new.get(variant.key, [])
        ]
        if not jobs:
            break
        results += stage("tuning" if turn == 0 else f"tuning, beyond the grid ({turn})", jobs)
        scores = _scores(settings, results)
        new = {}
        for key, worth in scores.items():
            beyond = _beyond(worth)
            if beyond is not None and beyond not in tried[key]:
                tried[key].append(beyond)
                new[key] = [beyond]
    return _scores(settings, results)


def _scores(settings: Settings, results: Sequence[Mapping[str, Any]]) -> Scores:
    """Mean loss after the last epoch over the tuning seeds; infinite where a run diverged or is missing."""
    losses: dict[str, dict[float, list[float]]] = {}
    for metrics in results:
        loss = float(metrics["looks"][-1]["loss"])
        losses.setdefault(metrics["variant"], {}).setdefault(metrics["lr"], []).append(loss)

    def worth(values: Sequence[float]) -> float:
        complete = len(values) == settings.tune_seeds and all(map(math.isfinite, values))
        return statistics.fmean(values) if complete else math.inf

    return {key: {lr: worth(values) for lr, values in sorted(by_rate.items())} for key, by_rate in losses.items()}


def _beyond(worth: Mapping[float, float]) -> float | None:
    """The next learning rate to try where the best so far is the lowest or the highest; None where it is inside."""
    best = min(worth, key=lambda lr: worth[lr])
    if best == min(worth):
        return max((lr for lr in LADDER if lr < 0.99 * best), default=None)
    if best == max(worth):
        return min((lr for lr in LADDER if lr > 1.01 * best), default=None)
    return None


def best_rates(settings: Settings, scores: Scores) -> Rates:
    """The rate of least loss of each method; methods without any are left out."""
    rates = dict(settings.given_rates)
    for key, worth in scores.items():
        best = min(worth, key=lambda lr: worth[lr])
        if math.isfinite(worth[best]):
            rates[key] = best
    return rates


def final_jobs(settings: Settings, rates: Mapping[str, float], digest: str) -> list[Job]:
    """The runs to compare, seed by seed, so that what is finished early is balanced."""
    return [
        settings.job(variant, "final", rates[variant.key], seed, digest)
        for seed in range(settings.seeds)
        for variant in settings.variants
        if variant.key in rates
    ]


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = (__doc__ or "").splitlines()[0].split(":")[0]
    return parse_settings(Settings, "python -m experiments.vtab transfer", description, args)


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command line `args` (``sys.argv`` for None); returns the metrics of the compared runs.

    Raises:
        MissingInputError: The images, or with ``--report`` the weights, are missing.
        InputError: A setting is wrong, or a folder holds a run of other settings.
    """
    settings = parse(args)
    halves(settings.root, settings.split_seed, settings.train_images, settings.validation_images)
    if settings.plan:
        from experiments.vtab.transfer_plan import plan

        print(plan(settings), flush=True)
        return []
    if settings.report and not settings.weights.is_file():
        raise MissingInputError(f"{settings.weights} does not exist: nothing is finished yet")
    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    with _logging(folder):
        started = time.perf_counter()
        pretraining = _pretrain(settings)
        digest = hashlib.sha256(settings.weights.read_bytes()).hexdigest()[:12]
        workers = 0 if settings.report else settings.workers
        with worker_pool(workers, ("peft", "experiments.vtab.transfer_model")) as pool:
            stage = Stage(settings, pool)
            scores = tune(settings, digest, stage)
            rates = best_rates(settings, scores)
            _LOGGER.info("learning rates: %s", ",".join(f"{key}={rate:g}" for key, rate in rates.items()))
            results = stage("comparison", final_jobs(settings, rates, digest))
        from experiments.vtab.transfer_report import write_report

        report = write_report(settings, pretraining, scores, rates, results, stage.failures, stage.seconds)
        _LOGGER.info(
            "%d runs, %d failed, %.0f minutes -> %s",
            len(results), len(stage.failures), (time.perf_counter() - started) / 60, report,
        )  # fmt: skip
    return results


def _pretrain(settings: Settings) -> dict[str, Any]:
    """Metrics of the pre-training, which is done first where it is missing; all images are decoded once."""
    from experiments.vtab.transfer_data import decoded
    from experiments.vtab.transfer_model import CROPPED_FROM, IMAGE_SIZE, Pretraining, pretrain

    found = halves(settings.root, settings.split_seed, settings.train_images, settings.validation_images)
    cache = Path(settings.output) / "cache"
    progress = settings.progress and sys.stdout.isatty()
    train = decoded(found.pretraining, CROPPED_FROM, cache, progress)
    held_out = decoded(found.held_out, IMAGE_SIZE, cache, progress)
    for split in (found.train, found.test, found.tuning, found.validation):
        decoded(split, IMAGE_SIZE, cache, progress)
    recipe = Pretraining(settings.split_seed, settings.pretrain_epochs)
    _LOGGER.info("pre-training on %d images of %d classes", len(train), found.classes[0])
    _, metrics = pretrain(recipe, found.classes[0], train, held_out, settings.weights.parent, progress)
    last = metrics["held_out"][-1]
    _LOGGER.info("pre-trained: held-out accuracy %.1f%%, %.0f s", 100 * last["accuracy"], metrics["seconds"])
    return metrics


@contextmanager
def _bar(settings: Settings, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar where there is a terminal; gives a function that moves it on."""
    if not (settings.progress and total and sys.stdout.isatty()):
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        row = progress.add_task(title, total=total)
        yield lambda: progress.advance(row)


@contextmanager
def _logging(folder: Path) -> Iterator[None]:
    """Our messages to the terminal and to ``log.txt``."""
    before = _LOGGER.handlers, _LOGGER.level, _LOGGER.propagate
    file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    _LOGGER.handlers, _LOGGER.propagate = [file, logging.StreamHandler(sys.stdout)], False
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        file.close()
        _LOGGER.handlers, _LOGGER.level, _LOGGER.propagate = before


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
