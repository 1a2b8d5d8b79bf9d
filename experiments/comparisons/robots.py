"""EVA, LoRA and full fine-tuning of a small Decision Transformer on robot tasks, measured in MuJoCo.

A network pre-trained on 40 Meta-World tasks comes with the project. A scripted expert shows it new tasks, every method
fine-tunes it on them for a few seconds, and rollouts in the simulator say what that is worth. The learning rates were
chosen by one rule on demonstrations and seeds that the tables do not use.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from eva_lightning import plots
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import digest, write_json
from eva_lightning.rl.collection import collect
from eva_lightning.rl.demonstrations import read_index
from eva_lightning.rl.tasks import parse_tasks
from experiments.comparisons import robots_run
from experiments.comparisons.robots_film import Film, interesting_goal, make_film
from experiments.comparisons.robots_run import FinetuningSettings, RolloutSettings
from experiments.comparisons.source_digest import ROOT
from experiments.report import learning_rates as rates
from experiments.report import page
from experiments.report.epochs import label, methods_of
from experiments.report.ranks import rank_figure
from experiments.report.terminal import say, show
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.options import RunnerOptions
from experiments.runner.settings import Role, option
from experiments.runner.statistics import PLUS_MINUS, Interval

METHODS = ("fft", "lora", "eva")
NONE = "none"  # the starting network itself
FILMED = "eva"
FIRST_TUNING_SEED = 1000
RULE = "lowest validation loss after the last step divided by that before training, mean over tasks and seeds"
COMMAND = "python -m experiments.demo --parts rl --tune"
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class Settings(RunnerOptions):
    """Settings of the comparison; the layout of ``configs/demo_rl.yaml``."""

    checkpoint: str = option(
        "experiments/metaworld/assets/dt_small_mt40.ckpt", "network to start from, relative to the repository",
        Role.RESULT,
    )  # fmt: skip
    tasks: tuple[str, ...] = option(("push-v3", "faucet-close-v3"), "tasks to fine-tune on", Role.SELECTION)
    seeds: int = option(2, "runs per task and method", Role.SELECTION, at_least=1)
    updates: int = option(50, "gradient steps", Role.RESULT, at_least=1)
    batch_size: int = option(32, "windows per step", Role.RESULT, at_least=1)
    episodes: int = option(10, "evaluation episodes after each run", Role.RESULT, at_least=1)
    demonstrations: int = option(20, "episodes of the expert to train on", Role.RESULT, at_least=1)
    held_out: int = option(4, "further ones, for the validation loss", Role.RESULT, at_least=1)
    noise: float = option(0.1, "standard deviation of the noise on the expert's actions", Role.RESULT, at_least=0)
    rank: int = option(4, "LoRA's rank and EVA's mean rank", Role.RESULT, at_least=1)
    rho: float = option(2.0, "EVA's largest rank over its mean rank", Role.RESULT, at_least=1)
    horizon: int = option(200, "steps of an episode", Role.RESULT, at_least=1)
    film_size: int = option(
        200, "height and width of the film's pictures, in pixels; 0: no film", Role.PLACE, at_least=0
    )
    learning_rates: dict[str, float] | None = option(None, "learning rate of every method", Role.SELECTION)
    tuning: dict[str, Any] | None = option(None, "how they were chosen, as --tune writes it", Role.SELECTION)
    tune: str | None = option(None, "choose the learning rates and write them to this file", Role.SELECTION)
    lrs: tuple[float, ...] = option((1e-3, 3e-3, 1e-2, 3e-2), "to choose from", Role.SELECTION, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", parse_tasks(self.tasks))

    @property
    def init(self) -> Path:
        """The starting network."""
        return ROOT / self.checkpoint

    @property
    def shown_updates(self) -> tuple[int, ...]:
        """Steps whose loss stands in the tables: the start, a fifth, half and the end of training."""
        return tuple(sorted({0, max(1, self.updates // 5), max(1, self.updates // 2), self.updates}))

    @property
    def noted_updates(self) -> tuple[int, ...]:
        """Steps after which the loss is measured, for the curves."""
        return tuple(sorted({*range(0, self.updates + 1, max(1, self.updates // 10)), *self.shown_updates}))


class Robots(Comparison):
    """The comparison.

    Args:
        options: Its settings.
        command: The command that repeats it.

    Attributes:
        section: What a page says about it; set by :meth:`report`.
    """

    name = "robots"
    modules = ("metaworld", "peft", "experiments.comparisons.robots_run")

    def __init__(self, options: Settings, command: str = "") -> None:
        self.options: Settings = options
        self.section: Markup | None = None
        self._command = command
        self._started = time.time()
        self._rates = {} if options.tune else rates.check_rates(options.learning_rates, METHODS)
        self._code = robots_run.code_of_runs()
        how = [options.demonstrations, options.held_out, options.noise, options.horizon, self._code]
        self._demonstrations = digest(how)

    def check(self) -> None:
        """The starting network must be there."""
        if not self.options.init.is_file():
            raise MissingInputError(f"there is no checkpoint {self.options.checkpoint}", setting="checkpoint")

    def prepare(self) -> None:
        """Let the scripted expert show the tasks."""
        options, folder = self.options, self._data()
        episodes = options.demonstrations + options.held_out
        if not _collected(folder, options.tasks, episodes):
            names = page.enumerated([short(task) for task in options.tasks])
            say(f"A scripted expert shows {names}, {episodes} episodes each ...")
            workers = max(1, options.slots_here())
            conditions: dict[str, Any] = {"noise": options.noise, "horizon": options.horizon}
            seed = FIRST_TUNING_SEED if options.tune else 0
            collect(options.tasks, episodes, folder, seed=seed, workers=workers, progress=False, **conditions)

    def cells(self) -> list[Cell]:
        """One per method, and one for the network before fine-tuning."""
        if self.options.tune:
            points = [Point.of(lr=lr) for lr in self.options.lrs]
            return [Cell(method, points, partial(self._tuning_jobs, method), _nothing) for method in METHODS]
        given = [
            Cell(method, [], _nothing, partial(self._final_jobs, method), Point.of(lr=lr))
            for method, lr in self._rates.items()
        ]
        return [Cell(NONE, [], _nothing, self._rollout_jobs, Point.of()), *given]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """How much of the validation loss is left."""
        return (loss_left(metrics["val_loss"]),)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Success, or how much of the loss is left."""
        if "successes" in metrics:
            return f"solved {sum(metrics['successes'])} of {len(metrics['successes'])}"
        return f"{loss_left(metrics['val_loss']):.0%} of the loss left"

    def report(self, results: Results) -> None:
        """Print the tables, film, write ``results.json``, and make the section."""
        if self.options.tune:
            self._report_tuning(results)
            return
        options, runs = self.options, results.runs
        before, after = runs[runs["method"] == NONE], runs[runs["method"] != NONE]
        tables = [results_table(options, task, before, after) for task in options.tasks]
        for table in tables:
            say("")
            show(table)
        low, high = options.noted_updates[0], options.noted_updates[-1]
        say(f"Curve: loss from step {low} to {high}, one scale per task. {self._caution()}")
        film, sentence = self._film(before, after)
        say(sentence)
        write_json(Path(options.output) / "results.json", runs.replace({np.nan: None}).to_dict("records"))
        self.section = page.render(
            "robots.html",
            options=options,
            tasks=page.enumerated([short(task) for task in options.tasks]),
            facts=self._facts(runs),
            tables=[replace(it, cells=it.cells.drop(columns="Curve")) for it in tables],
            caution=self._caution(),
            curves=[_curve_figure(options, task, after) for task in options.tasks],
            film=film,
            sentence=sentence,
            found=self._rank_figures(after),
            tuning=self._tuning(),
            tune_command=COMMAND,
            command=self._command,
        )

    def _data(self) -> Path:
        purpose = "tuning" if self.options.tune else "final"
        return Path(self.options.output) / "demonstrations" / f"{self._demonstrations}-{purpose}"

    def _rollout_jobs(self, point: Point) -> list[Job]:
        options = self.options
        return [
            Job(
                robots_run.build_rollouts,
                RolloutSettings(
                    task=task,
                    seed=seed,
                    init=str(options.init),
                    data=str(self._data()),
                    train_episodes=options.demonstrations,
                    episodes=options.episodes,
                    horizon=options.horizon,
                    demonstrations=self._demonstrations,
                    code=self._code,
                ),
                options.output,
                "final",
                {"task": task, "method": NONE, "seed": seed},
                f"{short(task)}, before fine-tuning, seed {seed}",
                order=seed,
            )
            for task in options.tasks
            for seed in range(options.seeds)
        ]

    def _final_jobs(self, method: str, point: Point) -> list[Job]:
        seeds = range(self.options.seeds)
        return [self._job(task, method, point, seed, "final") for task in self.options.tasks for seed in seeds]

    def _tuning_jobs(self, method: str, point: Point) -> list[Job]:
        return [self._job(task, method, point, FIRST_TUNING_SEED, "tune") for task in self.options.tasks]

    def _job(self, task: str, method: str, point: Point, seed: int, phase: Phase) -> Job:
        options, lr = self.options, point.get("lr")
        settings = FinetuningSettings(
            task=(task,),
            init=str(options.init),
            method=method,
            rank=options.rank,
            rho=options.rho,
            lr=lr,
            seeds=1,
            first_seed=seed,
            data=str(self._data()),
            train_episodes=options.demonstrations,
            val_episodes=options.held_out,
            max_steps=options.updates,
            batch_size=options.batch_size,
            val_at=options.noted_updates,
            horizon=options.horizon,
            eval_episodes=options.episodes if phase == "final" else 0,
            eval_seed=seed,
            accelerator="cpu",
            checkpoint_every=0,
            save=(method, seed) == (FILMED, 0),
            progress=False,
            demonstrations=self._demonstrations,
            code=self._code,
        )
        tags = {"task": task, "method": method, "lr": lr, "seed": seed}
        text = f"{short(task)}, {label(method)}, learning rate {lr:g}, seed {seed}"
        return Job(robots_run.build_finetuning, settings, options.output, phase, tags, text, order=seed)

    def _film(self, before: pd.DataFrame, after: pd.DataFrame) -> tuple[page.Figure | None, str]:
        """The film of the first task, and what it shows or why there is none."""
        options, task = self.options, self.options.tasks[0]
        first, last = _one(before, task, NONE), _one(after, task, FILMED)
        film = Film(
            before=str(options.init),
            after=str(Path(last["path"]) / "weights.ckpt"),
            label=f"{label(FILMED)}, {options.updates} steps",
            task=task,
            seed=0,
            goal=interesting_goal(first["successes"], last["successes"]),
            target_return=robots_run.target_return(self._data(), task, options.demonstrations),
            horizon=options.horizon,
            size=options.film_size,
        )
        file = Path(options.output) / "before_after.gif"
        solved, reason = make_film(film, file, options.workers or 0)
        if solved is None:
            return None, f"{reason}."
        was, now = ("solved" if it else "not solved" for it in solved)
        end = f"{label(FILMED)} after {options.updates} steps ({now})"
        shown = f"{short(task)}, the pre-trained network ({was}) beside {end}"
        chosen = "Chosen: the first evaluation goal that was missed before and reached after, or else the first."
        return page.embedded(file, f"Film: {shown}", f"{shown}. {chosen}"), f"Film: {file}. {shown}. {chosen}"

    def _rank_figures(self, runs: pd.DataFrame) -> list[page.Figure]:
        eva = runs[runs["method"] == FILMED]
        return [
            rank_figure(list(eva.loc[eva["task"] == task, "ranks"]), self.options.rank, f"Ranks on {short(task)}")
            for task in self.options.tasks
        ]

    def _caution(self) -> str:
        """What the figures are good for."""
        options = self.options
        n, seeds = options.seeds * options.episodes, page.counted(options.seeds, "seed")
        text = (
            f"Success means solved at any step of the episode. {n} episodes per cell ({options.episodes} goals for "
            f"each of {seeds}) rank no methods; ± 0.00 only says that the seeds were alike."
        )
        tuned = (options.tuning or {}).get("tasks", options.tasks)
        if set(tuned) != set(options.tasks):
            names = page.enumerated([short(task) for task in tuned])
            text += f" The rates were tuned on {names}: elsewhere they may be off."
        return text

    def _facts(self, runs: pd.DataFrame) -> dict[str, str]:
        options = self.options
        return {
            "Machine": page.machine(),
            "Versions": ", ".join(f"{name} {version}" for name, version in page.versions(robots_run.PACKAGES).items()),
            "Seeds": f"{page.counted(options.seeds, 'seed')}, from 0: each draws the batches, LoRA's random matrices "
            f"and {options.episodes} goals",
            "Starting network": f"{options.checkpoint}; a card beside it says how it was made",
            "Demonstrations": f"scripted experts, {options.horizon} steps, noise {options.noise:g} on the actions, "
            "seed 0",
            "Fine-tuning runs": page.finished_when(runs.loc[runs["method"] != NONE, "path"], self._started),
            "Time of this call": f"{time.time() - self._started:.0f} s",
        }

    def _tuning(self) -> rates.Tuning:
        """How the learning rates were chosen."""
        chosen, known = rates.chosen_in_words(self._rates), self.options.tuning
        scores = rates.scores_of(known)
        if known is None or scores.empty:
            return rates.Tuning(chosen)
        return rates.Tuning(
            chosen, known["rule"], rates.seeds_in_words(known["seeds"]), _scores_table(scores, self._rates)
        )

    def _report_tuning(self, results: Results) -> None:
        runs = results.tuning.assign(loss_left=results.tuning["val_loss"].map(loss_left))
        means = rates.mean_scores(runs, ["loss_left"])
        chosen = rates.chosen_rates(results.choices)
        show(_scores_table(means, chosen))
        tuning = {
            "rule": RULE,
            "tasks": list(self.options.tasks),
            "seeds": [FIRST_TUNING_SEED],
            "demonstrations_seed": FIRST_TUNING_SEED,
            "scores": means.to_dict("records"),
        }
        header = f"# Settings of the demo's robots part. Learning rates written by: {COMMAND}\n"
        rates.write_choice(Path(self.options.tune or ""), header, chosen, tuning)
        say(f"Learning rates written to {self.options.tune}.")


def short(task: str) -> str:
    """Without the version."""
    return task.removesuffix("-v3")


def loss_left(losses: Sequence[Mapping[str, float]]) -> float:
    """The validation loss after the last step divided by that before training."""
    return losses[-1]["val_loss"] / losses[0]["val_loss"]


def blocks(values: Sequence[float], low: float, high: float) -> str:
    """Values from `low` to `high` as a line of blocks."""
    places = [(value - low) / ((high - low) or 1.0) for value in values]
    return "".join(_BLOCKS[min(7, max(0, int(8 * place)))] for place in places)


def results_table(options: Settings, task: str, before: pd.DataFrame, after: pd.DataFrame) -> page.Table:
    """The network before fine-tuning, then a row per method. Seconds are medians."""
    runs, start = after[after["task"] == task], before[before["task"] == task]
    curves = {method: _losses(runs, method) for method in methods_of(runs)}
    means = [values.mean(axis=0) for values in curves.values()]
    low, high = float(np.min(means)), float(np.max(means))
    columns = [f"Step {step}" for step in options.shown_updates]
    first = {columns[0]: f"{means[0][0]:.4f}", "Success": _success(start)}
    rows: dict[str, dict[str, str]] = {f"{short(task)}, pre-trained": first}
    for method, values in curves.items():
        group = runs[runs["method"] == method]
        rows[label(method)] = {
            "Rate": f"{group['lr'].iloc[0]:g}",
            "Trained": f"{group['trainable_parameters'].mean():,.0f}\n{group['train_seconds'].median():.1f} s",
            **{
                f"Step {step}": Interval.of(values[:, options.noted_updates.index(step)].tolist())
                .text(4)
                .replace(" ± ", "\n± ")
                for step in options.shown_updates[1:]
            },
            "Curve": blocks(values.mean(axis=0), low, high),
            "Success": _success(group),
        }
    notes = (
        f"Loss: squared error of the actions on {options.held_out} held-out demonstrations.",
        PLUS_MINUS,
        f"Trained: parameters, with the action head, and the median time of {options.updates} steps.",
        "The time includes EVA's initialisation and the validation losses.",
    )
    cells = pd.DataFrame.from_dict(rows, orient="index").reindex(
        columns=["Rate", "Trained", *columns, "Curve", "Success"]
    )
    return page.Table(f"{short(task)}: validation loss and success", cells.fillna("").rename_axis("Method"), notes)


def _narrow(interval: Interval) -> str:
    return interval.text(4).replace(" ± ", "\n± ")


def _success(runs: pd.DataFrame) -> str:
    """Share of episodes solved, mean over seeds, and the count."""
    episodes = list(runs["successes"])
    solved, n = sum(map(sum, episodes)), sum(map(len, episodes))
    return f"{Interval.of([float(np.mean(run)) for run in episodes]).text(2)}\n{solved} of {n}"


def _losses(runs: pd.DataFrame, method: str) -> np.ndarray:
    """Validation losses ``(seeds, steps)``."""
    rows = runs[runs["method"] == method].sort_values("seed")["val_loss"]
    return np.array([[entry["val_loss"] for entry in losses] for losses in rows])


def _curve_figure(options: Settings, task: str, runs: pd.DataFrame) -> page.Figure:
    here = runs[runs["task"] == task]
    lines = {label(method): _losses(here, method) for method in methods_of(here)}
    last = ", ".join(f"{name} {values[:, -1].mean():.4f}" for name, values in lines.items())
    figure = plots.learning_curves(
        lines, "squared error of actions", xlabel="steps", title=short(task), x=options.noted_updates
    )
    alt = f"Validation loss on {short(task)}; after {options.updates} steps: {last}"
    return page.drawn(figure, alt, "Line: mean over seeds; band: 95% interval.")


def _scores_table(scores: pd.DataFrame, chosen: Mapping[str, float]) -> page.Table:
    return rates.scores_table(
        scores, chosen, {"loss_left": ".3f"}, "Loss after the last step divided by that before, mean over tasks"
    )


def _one(runs: pd.DataFrame, task: str, method: str) -> Mapping[str, Any]:
    """The run of `method` on `task` with seed 0."""
    row: Mapping[str, Any] = runs[(runs["task"] == task) & (runs["method"] == method) & (runs["seed"] == 0)].iloc[0]
    return row


def _collected(folder: Path, tasks: Sequence[str], episodes: int) -> bool:
    try:
        index = read_index(folder)
        return all(index[task].episodes >= episodes for task in tasks)
    except InputError:
        return False


def _nothing(point: Point) -> list[Job]:
    return []
