"""The robot part of the demo: EVA, LoRA and full fine-tuning of a small Decision Transformer, measured in MuJoCo.

A network pre-trained on 40 Meta-World tasks comes with the project. Here a scripted expert shows it new tasks, every
method fine-tunes it on them for a few seconds, and rollouts in the simulator say what that is worth. Settings and
learning rates are in ``configs/demo_rl.yaml``; the rates were chosen with

    python -m experiments.demo --parts rl --tune

on demonstrations and seeds that the table does not use.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from experiments.demo_rl_runs import (
    METHODS,
    Before,
    Config,
    Film,
    Run,
    RunResult,
    Workplace,
    collect_task,
    finetune_run,
    interesting_goal,
    measure_before,
    roll_one,
    write_film,
)
from experiments.demo_rl_summary import Row, before_success, rows, short
from experiments.runner.processes import worker_pool

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo_rl.yaml"
FILMED = "eva"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FIRST_TUNING_SEED = 1000
TUNING_SEEDS = 1
RULE = "lowest validation loss after the last update divided by that before training, mean over tasks and seeds"

#: What the processes need, imported while they wait for their first work.
_MODULES = (
    "metaworld",
    "experiments.metaworld.finetune",
    "eva_lightning.rl.rollouts",
    "eva_lightning.callback",
    "peft",
)

Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""What a progress bar says, a function, its arguments."""


@dataclass(frozen=True)
class Outcome:
    """Everything that the table and the report show.

    Attributes:
        config: Settings and learning rates.
        before: Rollouts of the starting network, per task and seed.
        results: The fine-tuning runs.
        film: The GIF, if one could be made.
        no_film: Why there is none.
        n_cached: Fine-tuning runs found finished.
        seconds: Wall-clock time of this call.
    """

    config: Config
    before: list[Before]
    results: list[RunResult]
    film: Film | None
    no_film: str
    n_cached: int
    seconds: float


def run_demo(out: Path, config_file: Path, workers: int, fresh: bool, console: Console) -> Outcome:
    """Fine-tune, roll out, film; print the table.

    Raises:
        MissingInputError: The configuration or the checkpoint is missing.
        InputError: A setting is wrong.
    """
    config = Config.read(config_file)
    setup = config.setup
    place = Workplace(out, setup)
    if fresh:
        shutil.rmtree(place.folder, ignore_errors=True)
    names = " and ".join(short(task) for task in setup.tasks)
    console.print(
        f"[bold]EVA demo, robot part.[/bold] A small Decision Transformer, pre-trained on 40 Meta-World tasks, learns "
        f"{names} from {setup.demonstrations} demonstrations each: {len(METHODS)} methods x "
        f"{counted(setup.seeds, 'seed')}, {setup.updates} updates, then {setup.episodes} episodes in MuJoCo.",
        highlight=False,
    )
    runs = [
        Run(task, method, config.learning_rates[method], seed, setup.episodes)
        for task in setup.tasks
        for seed in range(setup.seeds)
        for method in METHODS
    ]
    started = time.perf_counter()
    n_cached = sum(place.result(run) is not None for run in runs)
    starts = [(task, seed) for task in setup.tasks for seed in range(setup.seeds)]
    work = [_before_job(place, *start) for start in starts if place.before_result(*start) is None]
    work += [_run_job(place, run) for run in runs if place.result(run) is None]
    filmed = next(run for run in runs if (run.method, run.seed) == (FILMED, 0))
    film = None if work else _finished_film(place, filmed)
    reason = _why_no_film(setup.film_size) if film is None else ""
    if work or (film is None and not reason):
        with worker_pool(min(workers, max(1, len(work))), _MODULES) as pool:
            _do(_collections(place, setup.tasks, 0), pool, console, "Demonstrations")
            _do(work, pool, console, "Fine-tuning and rollouts")
            if not reason:
                film, reason = _make_film(place, filmed, pool, console)
    results = [_found(place.result(run)) for run in runs]
    before = [_found(place.before_result(*start)) for start in starts]
    seconds = time.perf_counter() - started
    outcome = Outcome(config, before, results, film, reason, n_cached, seconds)
    _print(outcome, console)
    if film is not None:
        copy = out / "before_after.gif"
        shutil.copyfile(film.path, copy)
        console.print(f"[bold]Film:[/bold] {copy}. {film_sentence(film, setup.updates)}", highlight=False)
    else:
        console.print(reason, soft_wrap=True, highlight=False)
    (out / "results_rl.json").write_text(json.dumps(as_plain(outcome), indent=1), encoding="utf-8")
    return outcome


def as_plain(outcome: Outcome) -> dict[str, Any]:
    """All numbers, for a JSON file."""
    runs = [
        {**dataclasses.asdict(result), "losses": {str(n): loss for n, loss in result.losses.items()}}
        for result in outcome.results
    ]
    return {
        "setup": dataclasses.asdict(outcome.config.setup),
        "before": [dataclasses.asdict(entry) for entry in outcome.before],
        "runs": runs,
    }


def film_sentence(film: Film, updates: int) -> str:
    """What the film shows, and how the episode was chosen."""
    was, now = ("solved" if solved else "not solved" for solved in film.solved)
    return (
        f"{short(film.task)}, the pre-trained network ({was}) beside {METHODS[FILMED]} after {updates} "
        f"updates ({now}). "
        "Chosen: the first evaluation goal that was missed before and reached after, or else the first."
    )


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def caution(outcome: Outcome) -> str:
    """What the figures are good for."""
    setup = outcome.config.setup
    n = setup.seeds * setup.episodes
    tuning = outcome.config.tuning
    tuned = ""
    if tuning and set(tuning["tasks"]) != set(setup.tasks):
        names = " and ".join(short(task) for task in tuning["tasks"])
        tuned = f" The rates were tuned on {names}: elsewhere they may be off."
    return (
        f"Success means solved at any step of the episode. {n} episodes per cell ({setup.episodes} goals for each of "
        f"{counted(setup.seeds, 'seed')}) rank no methods; an error of 0.00 only says that the seeds were alike."
        f"{tuned}"
    )


def _before_job(place: Workplace, task: str, seed: int) -> Job:
    return f"{short(task)}, before fine-tuning, goals {seed}", measure_before, (place, task, seed)


def _run_job(place: Workplace, run: Run) -> Job:
    return run.label, finetune_run, (place, run)


def _collections(place: Workplace, tasks: Sequence[str], seed: int) -> list[Job]:
    missing = [task for task in tasks if not place.collected(task, seed)]
    return [(f"{short(task)}, scripted expert", collect_task, (place, task, seed)) for task in missing]


def _do(jobs: Sequence[Job], pool: ProcessPoolExecutor | None, console: Console, title: str) -> list[Any]:
    """Results of all jobs, in their order, with a progress bar.

    Raises:
        RuntimeError: A job failed; names it, with the error as its cause.
    """
    if not jobs:
        return []
    columns = (
        TextColumn("{task.description:<46}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    results: dict[int, Any] = {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=len(jobs))

        def done(index: int, result: Any) -> None:
            results[index] = result
            progress.update(bar, advance=1, description=f"{title}: {jobs[index][0]}"[:46])

        if pool is None:
            for index, (_, function, arguments) in enumerate(jobs):
                done(index, function(*arguments))
        else:
            futures: dict[Future[Any], int] = {pool.submit(f, *args): i for i, (_, f, args) in enumerate(jobs)}
            for future in as_completed(futures):
                index = futures[future]
                try:
                    done(index, future.result())
                except Exception as error:
                    raise RuntimeError(f"{jobs[index][0]} failed: {error}") from error
        progress.update(bar, description=title)
    return [results[index] for index in range(len(jobs))]


def _goal(place: Workplace, run: Run) -> int:
    return interesting_goal(_found(place.before_result(run.task, run.seed)), _found(place.result(run)))


def _finished_film(place: Workplace, run: Run) -> Film | None:
    goal = _goal(place, run)
    path = place.film(run, goal)
    note = path.with_suffix(".json")
    if not (path.is_file() and note.is_file()):
        return None
    was, now = json.loads(note.read_text(encoding="utf-8"))["solved"]
    return Film(path, run.task, goal, (was, now))


def _make_film(
    place: Workplace, run: Run, pool: ProcessPoolExecutor | None, console: Console
) -> tuple[Film | None, str]:
    """The film, or None and the reason. Whatever goes wrong in drawing, the numbers are worth more than the picture."""
    goal = _goal(place, run)
    checkpoints = (place.setup.init, place.run(run) / "weights.ckpt")
    jobs: list[Job] = [
        (f"{short(run.task)}, {when}", roll_one, (place, checkpoint, run.task, run.seed, goal))
        for when, checkpoint in zip(("before", "after"), checkpoints, strict=True)
    ]
    try:
        (before, was), (after, now) = _do(jobs, pool, console, "Film")
        words = ("solved" if was else "not solved", "solved" if now else "not solved")
        labels = (f"before: {words[0]}", f"{METHODS[run.method]}, {place.setup.updates} updates: {words[1]}")
        path = place.film(run, goal)
        write_film(path, before, after, labels)
    except Exception as error:
        return None, f"no video: {error}"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"solved": [was, now]}), encoding="utf-8")
    temporary.replace(path.with_suffix(".json"))
    return Film(path, run.task, goal, (was, now)), ""


def _why_no_film(size: int) -> str:
    """Nothing, or one sentence."""
    from eva_lightning.rl.rendering import no_video_reason, rendering_backend

    if size == 0:
        return "no video: setup.film_size is 0"
    return "" if rendering_backend() is not None else no_video_reason()


T = TypeVar("T")


def _found(value: T | None) -> T:
    assert value is not None
    return value


def results_table(table: Sequence[Row], before: Sequence[Before], shown: Sequence[int]) -> Table:
    """Validation loss after some updates with its curve, and success, of every method and task."""
    view = Table()
    view.add_column("Task, method", no_wrap=True)
    view.add_column("Rate", justify="right", no_wrap=True)
    for updates in shown:
        view.add_column(f"Update {updates}", justify="right", no_wrap=True)
    view.add_column("Curve", no_wrap=True)
    view.add_column("Success", justify="right", no_wrap=True)
    for task in dict.fromkeys(row.task for row in table):
        here = [row for row in table if row.task == task]
        start = before_success(before, task)
        blanks = [""] * (len(shown) - 1)
        view.add_row(
            f"{short(task)}, none", "", f"{here[0].losses[0].mean:.4f}", *blanks, "", f"{start.text()}\n{start.count()}"
        )
        low, high = (pick(value.mean for row in here for value in row.losses.values()) for pick in (min, max))
        for row in here:
            view.add_row(
                f"  {row.name}",
                f"{row.learning_rate:g}",
                "",
                *(row.losses[updates].text(4).replace(" ", "\n") for updates in shown[1:]),
                row.curve(low, high),
                f"{row.success.text()}\n{row.success.count()}",
                end_section=row is here[-1],
            )
    return view


def _print(outcome: Outcome, console: Console) -> None:
    setup = outcome.config.setup
    if outcome.n_cached:
        n = len(outcome.results)
        console.print(f"Of {n} fine-tuning runs, {outcome.n_cached} were finished before; --fresh repeats them.")
    console.print(
        "\n[bold]Validation loss[/bold] (held-out demonstrations) and [bold]success[/bold]: mean ± standard error"
    )
    table = rows(outcome.results)
    console.print(results_table(table, outcome.before, setup.shown_updates))
    low, high = setup.noted_updates[0], setup.noted_updates[-1]
    console.print(f"Curve: loss from update {low} to {high}, one scale per task. {caution(outcome)}", highlight=False)


def run_tuning(
    out: Path, config_file: Path, workers: int, fresh: bool, rates: Sequence[float], console: Console
) -> None:
    """Choose a learning rate per method and write it to the configuration.

    One rule for all: the lowest validation loss after the last update, relative to the loss before training, averaged
    over tasks and seeds.

    Raises:
        MissingInputError: The checkpoint is missing.
        InputError: A setting is wrong.
    """
    config = Config.read(config_file, rates_needed=False)
    setup = config.setup
    place = Workplace(out, setup)
    if fresh:
        shutil.rmtree(place.folder, ignore_errors=True)
    tasks = setup.tasks
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + TUNING_SEEDS)
    runs = [
        Run(task, method, rate, seed, 0, FIRST_TUNING_SEED)
        for task in tasks
        for seed in seeds
        for method in METHODS
        for rate in rates
    ]
    names = " and ".join(map(short, tasks))
    console.print(f"Tuning: {len(METHODS)} methods x {len(rates)} rates on {names}, {counted(len(seeds), 'seed')}.")
    work = [_run_job(place, run) for run in runs if place.result(run) is None]
    with worker_pool(min(workers, len(work)), _MODULES) as pool:
        if work:
            _do(_collections(place, tasks, FIRST_TUNING_SEED), pool, console, "Demonstrations")
            _do(work, pool, console, "Fine-tuning")
    chosen, scores = choose_rates([_found(place.result(run)) for run in runs])
    view = Table(title="loss after the last update ÷ loss before training, mean over tasks and seeds")
    view.add_column("Method")
    for rate in sorted(rates):
        view.add_column(f"{rate:g}", justify="right")
    for method, row in scores.items():
        view.add_row(METHODS[method], *(f"{row[r]:.3f}{' *' if r == chosen[method] else ''}" for r in sorted(rates)))
    console.print(view)
    settings = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(setup).items()
    }
    content = {
        "setup": settings,
        "learning_rates": chosen,
        "tuning": {
            "rule": RULE,
            "tasks": list(tasks),
            "seeds": list(seeds),
            "demonstrations_seed": FIRST_TUNING_SEED,
            "scores": scores,
        },
    }
    command = "python -m experiments.demo --parts rl --tune"
    header = f"# Settings of the demo's robot part. Learning rates written by: {command}\n"
    temporary = config_file.with_suffix(".part")
    temporary.write_text(header + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    temporary.replace(config_file)
    console.print(f"Learning rates written to {config_file.name}.", soft_wrap=True)


def choose_rates(results: Sequence[RunResult]) -> tuple[dict[str, float], dict[str, dict[float, float]]]:
    """Per method, the best rate of the grid and the score of each (see :func:`run_tuning`)."""
    scores: dict[str, dict[float, float]] = {}
    for method in METHODS:
        mine = [result for result in results if result.run.method == method]
        scores[method] = {}
        for rate in sorted({result.run.learning_rate for result in mine}):
            ratios = []
            for result in mine:
                if result.run.learning_rate == rate:
                    losses = list(result.losses.values())
                    ratios.append(losses[-1] / losses[0])
            scores[method][rate] = round(sum(ratios) / len(ratios), 4)
    return {method: min(row, key=row.__getitem__) for method, row in scores.items()}, scores
