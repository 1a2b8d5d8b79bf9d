"""Compare methods on CW10 tasks: ``python -m experiments.metaworld compare --config configs/metaworld/compare.yaml``.

Every method is fine-tuned on every task with several seeds, at the same rank budget and at a learning rate tuned for
it alone, by validation loss, on other seeds. Noted are validation losses on the way and success at the end; the report
has means with 95% intervals and paired differences between methods.

Runs go over processes. Each is a folder of its own below OUTPUT/runs (OUTPUT/tuning for the tuning): a command that was
ended anywhere continues with the runs that are missing, and the same command on finished runs writes the report anew.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from eva_lightning.errors import InputError
from eva_lightning.rl.tasks import parse_tasks
from experiments.metaworld import finetune
from experiments.metaworld.compare_runs import Job, Variant, run_all
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings

_LOGGER = logging.getLogger("experiments.metaworld.compare")

#: Seconds that a run takes besides updates and rollouts: loading, EVA's streaming, validation losses.
_PER_RUN = 2.0


@dataclass(frozen=True)
class Settings:
    """What to compare; the layout of ``configs/metaworld/compare.yaml``."""

    init: str = option(MISSING, "checkpoint of the pre-trained model, made by the pretrain command")
    tasks: str = option("faucet-close,window-close,push,handle-press-side", "tasks with commas between them, or cw10")
    methods: str = option("scratch,fft,lora,dora,eva:1,eva:2,eva-dora:2", "methods; EVA with its ρ behind a colon")
    seeds: int = option(5, "seeds per method and task, from 0")
    rank: int = option(4, "LoRA rank; EVA's mean rank per layer, so that all share one budget")
    train_episodes: int = option(20, "demonstrations to train on")
    val_episodes: int = option(8, "held-out demonstrations for the validation loss")
    max_steps: int = option(500, "updates")
    batch_size: int = option(8, "windows per update")
    val_at: str = option("10,25,50,150,500", "updates after which the validation loss is noted, with commas")
    eval_episodes: int = option(50, "episodes rolled out at the end of each run; 0 for none")
    horizon: int = option(200, "steps of an evaluation episode, at most 500")
    rates: str | None = option(None, "learning rates, as lora=0.01,eva:2=0.01,...; the others are tuned")
    tune: bool = option(True, "tune learning rates that --rates does not name; false: all must be named")
    grid: str = option("3e-4,1e-3,3e-3,1e-2,3e-2", "learning rates to try when tuning, with commas")
    tune_steps: int = option(100, "updates of a tuning run")
    tune_seeds: int = option(1, "seeds of the tuning, from 100")
    workers: int = option(2, "processes, of one thread each; 0 for none besides this one")
    data: str = option("data/metaworld", "folder of demonstrations, made by the collect command")
    cache: str | None = option(None, "folder for memory-mapped data; DATA/cache if not given")
    output: str = option("runs/metaworld-compare", "folder for runs and report")
    plan: bool = option(False, "measure the speed, say what there is to do and how long it takes, and stop")
    report: bool = option(False, "write the report of what is finished so far, and stop; also while runs go on")
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("tune_steps", 1), ("tune_seeds", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        keys = [variant.key for variant in self.variants]
        if len(set(keys)) < len(keys):
            raise InputError(f"methods must differ, got {self.methods!r}")
        unnamed = [key for key in keys if key not in self.given_rates]
        if unnamed and not self.tune:
            raise InputError(f"rates must name every method when tune is false; {unnamed[0]} is missing")
        _ = self.learning_rates
        self.base(self.task_names[0], self.variants[0], 1e-3)  # checks the others

    @property
    def task_names(self) -> tuple[str, ...]:
        """Full names of the tasks."""
        return parse_tasks(self.tasks)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The methods."""
        return tuple(Variant.parse(word) for word in self.methods.split(",") if word.strip())

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The grid, in ascending order."""
        try:
            rates = sorted({float(word) for word in self.grid.split(",") if word.strip()})
        except ValueError:
            raise InputError(f"grid must be numbers with commas between them, got {self.grid!r}") from None
        if not rates or rates[0] <= 0:
            raise InputError(f"grid must be learning rates above 0, got {self.grid!r}")
        return tuple(rates)

    @property
    def given_rates(self) -> dict[str, float]:
        """Learning rates by method, of those that are given."""
        rates = {}
        for word in (self.rates or "").split(","):
            if not word.strip():
                continue
            name, _, value = word.partition("=")
            try:
                rates[Variant.parse(name).key] = float(value)
            except ValueError as error:
                raise InputError(f"rates must be written as lora=0.01,eva:2=0.01, got {word.strip()!r}") from error
        return rates

    @property
    def val_steps(self) -> tuple[int, ...]:
        """Updates after which the validation loss is noted."""
        return self.base(self.task_names[0], self.variants[0], 1e-3).val_steps

    def base(self, task: str, variant: Variant, lr: float) -> finetune.Settings:
        """Settings of the runs of the comparison."""
        return finetune.Settings(
            task=task,
            init=self.init,
            method=variant.method,
            rank=self.rank,
            rho=2.0 if variant.rho is None else variant.rho,
            seeds=1,
            data=self.data,
            train_episodes=self.train_episodes,
            val_episodes=self.val_episodes,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=lr,
            val_at=self.val_at,
            eval_episodes=self.eval_episodes,
            horizon=self.horizon,
            accelerator="cpu",
            cache=self.cache,
            output=str(Path(self.output) / "runs"),
            progress=False,
        )


def tuning_jobs(settings: Settings) -> list[Job]:
    """Short runs of every method without a given rate, at every rate of the grid."""
    jobs = []
    for seed in range(100, 100 + settings.tune_seeds):
        for task in settings.task_names:
            for variant in settings.variants:
                if variant.key in settings.given_rates:
                    continue
                for lr in settings.learning_rates:
                    run = replace(
                        settings.base(task, variant, lr),
                        max_steps=settings.tune_steps,
                        val_at="",
                        eval_episodes=0,
                        output=str(Path(settings.output) / "tuning"),
                    )
                    jobs.append(Job(variant, seed, run))
    return jobs


def comparison_jobs(settings: Settings, rates: Mapping[str, float]) -> list[Job]:
    """The runs to compare, seed by seed, so that what is finished early is balanced."""
    return [
        Job(variant, seed, settings.base(task, variant, rates[variant.key]))
        for seed in range(settings.seeds)
        for task in settings.task_names
        for variant in settings.variants
    ]


def choose_rates(settings: Settings, tuning: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """The best learning rate of each method, and what each was worth.

    The criterion is the geometric mean over tasks and seeds of the validation loss after the last update of the tuning
    runs: tasks of different scale count alike. A rate at which a run failed or diverged is not chosen.

    Raises:
        InputError: No rate of a method has all its runs.
    """
    chosen, scores = dict(settings.given_rates), {}
    for variant in settings.variants:
        if variant.key in chosen:
            continue
        worth = {}
        for lr in settings.learning_rates:
            runs = [run for run in tuning if run["variant"] == variant.key and run["lr"] == lr]
            losses = [float(run["val_loss"][-1]["val_loss"]) for run in runs]
            if len(losses) == len(settings.task_names) * settings.tune_seeds and all(map(math.isfinite, losses)):
                worth[lr] = math.exp(statistics.fmean(map(math.log, losses)))
        if not worth:
            raise InputError(
                f"{variant.key} failed in tuning at every learning rate: see error.txt in {settings.output}/tuning"
            )
        chosen[variant.key] = min(worth, key=lambda lr: worth[lr])
        scores[variant.key] = worth
    return chosen, scores


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = (__doc__ or "").splitlines()[0].split(":")[0]
    return parse_settings(Settings, "python -m experiments.metaworld compare", description, args)


def main(args: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command line `args` (``sys.argv`` for None); returns the metrics of the compared runs.

    Raises:
        MissingInputError: The checkpoint or the demonstrations are missing.
        InputError: A setting is wrong, or a folder holds a run of other settings.
    """
    settings = parse(args)
    _check(settings)
    tuning = tuning_jobs(settings)
    if settings.plan or not (settings.report or (Path(settings.output) / "results.csv").is_file()):
        print(plan(settings, tuning), flush=True)
    if settings.plan:
        return []
    from experiments.metaworld.compare_report import write_report

    folder = Path(settings.output)
    folder.mkdir(parents=True, exist_ok=True)
    with _logging(folder):
        started = time.perf_counter()
        tuned, _ = _run(settings, tuning, "tuning")
        rates, scores = choose_rates(settings, tuned)
        scores = _note_rates(folder / "rates.yaml", rates, scores)
        words = ",".join(f"{key}={rate:g}" for key, rate in rates.items())
        _LOGGER.info("learning rates: %s", words)
        results, failures = _run(settings, comparison_jobs(settings, rates), "comparison")
        report = write_report(settings, results, rates, scores, tuned, failures)
        _LOGGER.info(
            "%d runs, %d failed, %.0f minutes -> %s",
            len(results), len(failures), (time.perf_counter() - started) / 60, report,
        )  # fmt: skip
    return results


def _note_rates(file: Path, rates: Mapping[str, float], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Write what was chosen, and keep what an earlier tuning into this folder has found."""
    found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = {**(found.get("scores") or {}), **scores}
    file.write_text(yaml.safe_dump({"rates": dict(rates), "scores": kept}), encoding="utf-8")
    return kept


def _check(settings: Settings) -> None:
    """Say what is missing before anything is started."""
    from eva_lightning.rl.demonstrations import read_index
    from eva_lightning.rl.environments import check_horizon
    from eva_lightning.rl.module import read_checkpoint

    check_horizon(settings.horizon)
    read_checkpoint(settings.init)
    index = read_index(settings.data)
    for task in settings.task_names:
        episodes, needed = index[task].episodes, settings.train_episodes + settings.val_episodes
        if episodes < needed:
            raise InputError(f"{settings.data} has {episodes} episodes of {task}, but {needed} are needed")


def _run(settings: Settings, jobs: Sequence[Job], title: str) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Metrics of all `jobs` that did not fail, in their order, and what went wrong with the others."""
    done = {job: job.folder.result() for job in jobs}
    if settings.report:
        finished = [metrics for metrics in done.values() if metrics is not None]
        _LOGGER.info("%s: %d of %d runs are finished", title, len(finished), len(jobs))
        return finished, []
    todo = [job for job in jobs if done[job] is None]
    if len(todo) < len(jobs):
        _LOGGER.info("%s: %d of %d runs are finished already", title, len(jobs) - len(todo), len(jobs))
    failures, started = [], time.perf_counter()
    with _bar(settings, title, len(todo)) as advance:
        for number, outcome in enumerate(run_all(todo, settings.workers), 1):
            job, metrics = outcome.job, outcome.metrics
            done[job] = metrics
            left = (time.perf_counter() - started) / number * (len(todo) - number) / 60
            if metrics is None:
                failures.append((job.text, outcome.error or ""))
                _LOGGER.warning("%s %d/%d: %s failed: %s", title, number, len(todo), job.text, outcome.error)
            else:
                loss = metrics["val_loss"][-1]["val_loss"]
                rate = metrics["success_rate"]
                text = f"validation loss {loss:.4f}" + ("" if rate is None else f", success {rate:.2f}")
                _LOGGER.info("%s %d/%d: %s: %s; %.0f min left", title, number, len(todo), job.text, text, left)
            advance()
    return [metrics for job in jobs if (metrics := done[job]) is not None], failures


def _measure_speed(settings: Settings) -> tuple[dict[str, float], float]:
    """Seconds per update of each method and per rolled-out episode, from some of each."""
    import torch

    from eva_lightning.rl.module import DecisionTransformerModule
    from eva_lightning.rl.rollouts import evaluate
    from eva_lightning.rl.trajectories import TrajectoryDataModule
    from experiments.metaworld.compare_runs import quiet

    quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = settings.task_names[0]
        updates = {}
        for variant in settings.variants:
            module = DecisionTransformerModule.from_pretrained(settings.init)
            data = TrajectoryDataModule(
                settings.data, [task], module.context, settings.batch_size, settings.train_episodes,
                settings.val_episodes, cache_dir=settings.cache,
            )  # fmt: skip
            # EVA has LoRA's cost, and its callback needs a trainer
            like = replace(variant, method={"eva": "lora", "eva-dora": "dora"}.get(variant.method, variant.method))
            module, _ = finetune.prepare(settings.base(task, like, 1e-3), module, 0)
            optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)
            batch = next(iter(data.train_dataloader()))
            times = []
            for _ in range(8):
                started = time.perf_counter()
                optimizer.zero_grad()
                module.train().loss(batch).backward()
                optimizer.step()
                times.append(time.perf_counter() - started)
            updates[variant.key] = statistics.median(times[2:]) * 1.1  # the trainer's share
        module = DecisionTransformerModule.from_pretrained(settings.init)
        if settings.eval_episodes == 0:
            return updates, 0.0
        evaluate(module, task, target_return=1000.0, episodes=1, horizon=1)  # the simulator's first start
        n, steps = min(20, settings.eval_episodes), min(20, settings.horizon)
        started = time.perf_counter()
        result = evaluate(module, task, target_return=1000.0, episodes=n, horizon=steps)
        building = time.perf_counter() - started - result.seconds
        return updates, result.seconds / n * settings.horizon / steps + building / settings.eval_episodes
    finally:
        torch.set_num_threads(threads)


def _estimate(settings: Settings, jobs: Sequence[Job], updates: Mapping[str, float], episode: float) -> float:
    """Seconds that `jobs` take, over all workers."""
    total = sum(
        job.settings.max_steps * updates[job.variant.key] + job.settings.eval_episodes * episode + _PER_RUN
        for job in jobs
    )
    return total / max(1, settings.workers)


def plan(settings: Settings, tuning: Sequence[Job]) -> str:
    """What there is to do, and how long it takes by the speed measured now."""
    updates, episode = _measure_speed(settings)
    todo = [job for job in tuning if job.folder.result() is None]
    rates = {variant.key: settings.learning_rates[0] for variant in settings.variants}
    # the rates are not known before the tuning, and do not matter here
    compared = comparison_jobs(settings, rates)
    seconds = _estimate(settings, [*todo, *compared], updates, episode)
    speed = ", ".join(f"{key} {value * 1000:.0f}" for key, value in updates.items())
    estimate = (
        f"estimate: {seconds / 60:.0f} minutes with {max(1, settings.workers)} workers, if nothing of the comparison "
        "is finished and the machine does nothing else"
    )
    size = f"{len(compared)} runs of {settings.max_steps} updates and {settings.eval_episodes} episodes"
    factors = f"{len(settings.variants)} methods x {len(settings.task_names)} tasks x {settings.seeds} seeds"
    return "\n".join(
        [
            f"tuning: {len(tuning)} runs of {settings.tune_steps} updates, {len(tuning) - len(todo)} of them finished",
            f"comparison: {size} ({factors})",
            f"measured: {speed} ms per update of {settings.batch_size} windows; {episode:.2f} s per episode",
            estimate,
        ]
    )


@contextmanager
def _bar(settings: Settings, title: str, total: int) -> Iterator[Any]:
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
    logger = logging.getLogger("experiments.metaworld.compare")
    before = logger.handlers, logger.level, logger.propagate
    file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    logger.handlers, logger.propagate = [file, logging.StreamHandler(sys.stdout)], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        file.close()
        logger.handlers, logger.level, logger.propagate = before


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
