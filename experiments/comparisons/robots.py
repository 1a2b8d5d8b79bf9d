"""EVA, LoRA and full fine-tuning of a small Decision Transformer on robot tasks, measured in MuJoCo.

A network pre-trained on 40 Meta-World tasks comes with the project. A scripted expert shows it new tasks, every method
fine-tunes it on them for a few seconds, and rollouts in the simulator say what that is worth. The learning rates were
chosen by one rule on demonstrations and seeds that the tables do not use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import digest
from eva_lightning.rl.collection import collect
from eva_lightning.rl.demonstrations import read_index
from experiments.comparisons import robots_run
from experiments.comparisons.robots_film import RULE, Film, goal_to_film, learnt_goals, make_film
from experiments.comparisons.robots_run import FinetuningSettings
from experiments.comparisons.robots_settings import Settings
from experiments.comparisons.robots_tables import CRITERION, curve_figure, headlines, loss_left, results_table, short
from experiments.comparisons.tuned import FIRST_TUNING_SEED, TunedComparison, no_jobs
from experiments.metaworld.before import RolloutSettings
from experiments.metaworld.before_run import target_return
from experiments.report import learning_rates as rates
from experiments.report import page
from experiments.report.epochs import label
from experiments.report.ranks import rank_figure
from experiments.report.terminal import say, show
from experiments.runner.cells import Cell
from experiments.runner.jobs import Job, Phase, Point

METHODS = ("fft", "lora", "eva")
NONE = "none"  # the starting network itself
FILMED = "eva"


class Robots(TunedComparison):
    """The comparison; see :class:`~experiments.comparisons.tuned.TunedComparison`."""

    name = "robots"
    modules = ("metaworld", "peft", "experiments.comparisons.robots_run")
    methods = METHODS
    packages = robots_run.PACKAGES
    header = "Settings of the demo's robots part."
    rule = f"lowest {CRITERION}, mean over tasks and seeds"
    tune_command = "python -m experiments.demo --parts rl --tune"
    options: Settings

    def __init__(self, options: Settings, command: str = "") -> None:
        super().__init__(options, command)
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

    def final_cells(self) -> list[Cell]:
        """One for the network before fine-tuning, and one per method."""
        return [Cell(NONE, [], no_jobs, self._rollout_jobs, Point.of()), *super().final_cells()]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """How much of the validation loss is left."""
        return (loss_left(metrics["val_loss"]),)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Success, or how much of the loss is left."""
        if "successes" in metrics:
            return f"solved {sum(metrics['successes'])} of {len(metrics['successes'])}"
        return f"{loss_left(metrics['val_loss']):.0%} of the loss left"

    def report_runs(self, runs: pd.DataFrame) -> page.Section:
        """Print the tables, draw the video, and return the section."""
        options = self.options
        before, after = runs[runs["method"] == NONE], runs[runs["method"] != NONE]
        tables = [results_table(options, task, before, after) for task in options.tasks]
        for table in tables:
            say("")
            show(table)
        say(self._caution())
        film, sentence = self._film(before, after)
        say(sentence)
        body = page.render(
            "robots.html",
            options=options,
            tasks=page.enumerated([short(task) for task in options.tasks]),
            facts=self._facts(runs),
            tables=tables,
            caution=self._caution(),
            curves=[curve_figure(options, task, after) for task in options.tasks],
            film=film,
            sentence=sentence,
            found=self._rank_figures(after),
            tuning=self.tuning(),
            command=self.command,
        )
        verdict = [sentence for task in options.tasks for sentence in headlines(options, task, before, after)]
        return page.Section("EVA on robot tasks", body, (*verdict, self._caution()))

    def _data(self) -> Path:
        purpose = "tuning" if self.options.tune else "final"
        return Path(self.options.output) / "demonstrations" / f"{self._demonstrations}-{purpose}"

    def jobs(self, method: str, lr: float, phase: Phase) -> list[Job]:
        """One run per task and seed."""
        seeds = [FIRST_TUNING_SEED] if phase == "tune" else range(self.options.seeds)
        return [self._job(task, method, lr, seed, phase) for task in self.options.tasks for seed in seeds]

    def scores(self, runs: pd.DataFrame) -> pd.DataFrame:
        """How much of the validation loss is left."""
        return rates.mean_scores(runs.assign(loss_left=runs["val_loss"].map(loss_left)), ["loss_left"])

    def scores_table(self, scores: pd.DataFrame, chosen: Mapping[str, float]) -> page.Table:
        """The same."""
        caption = f"{CRITERION[0].upper()}{CRITERION[1:]}, mean over tasks"
        return rates.scores_table(scores, chosen, {"loss_left": ".3f"}, caption)

    def tuning_record(self) -> dict[str, Any]:
        """On what."""
        seed = FIRST_TUNING_SEED
        return {"tasks": list(self.options.tasks), "seeds": [seed], "demonstrations_seed": seed}

    def _rollout_jobs(self, point: Point) -> list[Job]:
        seeds = range(self.options.seeds)
        return [self._rollout_job(task, seed) for task in self.options.tasks for seed in seeds]

    def _rollout_job(self, task: str, seed: int) -> Job:
        options = self.options
        settings = RolloutSettings(
            task=task,
            seed=seed,
            init=str(options.init),
            data=str(self._data()),
            train_episodes=options.demonstrations,
            episodes=options.episodes,
            horizon=options.horizon,
            demonstrations=self._demonstrations,
            code=self._code,
        )
        tags = {"task": task, "method": NONE, "seed": seed}
        text = f"{short(task)}, before fine-tuning, seed {seed}"
        return Job(robots_run.build_rollouts, settings, options.output, "final", tags, text, order=seed)

    def _job(self, task: str, method: str, lr: float, seed: int, phase: Phase) -> Job:
        options = self.options
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

    def _film(self, before: pd.DataFrame, after: pd.DataFrame) -> tuple[page.Film | None, str]:
        """The film of the first task, and what it shows or why there is none."""
        options, task = self.options, self.options.tasks[0]
        first, last = _one(before, task, NONE), _one(after, task, FILMED)
        film = Film(
            before=str(options.init),
            after=str(Path(last["path"]) / "weights.ckpt"),
            label=f"{label(FILMED)}, {options.updates} steps",
            task=task,
            seed=0,
            goal=goal_to_film(first["successes"], last["successes"]),
            target_return=target_return(self._data(), task, options.demonstrations),
            horizon=options.horizon,
            size=options.film_size,
        )
        file = Path(options.output) / "before_after.gif"
        made = make_film(film, file, options.workers or 0)
        if made.solved is None:
            return None, f"{made.reason}."
        was, now = ("solved" if it else "not solved" for it in made.solved)
        end = f"{label(FILMED)} after {options.updates} steps ({now})"
        learnt = len(learnt_goals(first["successes"], last["successes"]))
        goals = f"goal {film.goal + 1} of {options.episodes}, {learnt} of which were missed before and reached after"
        shown = f"{short(task)}, {goals}: the pre-trained network ({was}) beside {end}"
        files = page.enumerated([name for name in (file, made.mp4) if name is not None])
        caption = f"{shown}. {RULE}" + (f" {made.reason}." if made.reason else "")
        return page.filmed(file, made.mp4, made.poster, f"Film: {shown}", caption), f"Film: {files}. {caption}"

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
        text = f"{n} episodes per cell ({options.episodes} goals for each of {seeds}) rank no methods."
        tuned = (options.tuning or {}).get("tasks", options.tasks)
        if not set(options.tasks) <= set(tuned):
            names = page.enumerated([short(task) for task in tuned])
            text += f" The rates were tuned on {names}: elsewhere they may be off."
        return text

    def _facts(self, runs: pd.DataFrame) -> dict[str, str]:
        options = self.options
        facts = {
            "Seeds": f"{page.counted(options.seeds, 'seed')}, from 0: each draws the batches, LoRA's random matrices "
            f"and {options.episodes} goals",
            "Starting network": f"{options.checkpoint}; a card beside it says how it was made",
            "Demonstrations": f"scripted experts, {options.horizon} steps, noise {options.noise:g} on the actions, "
            "seed 0",
        }
        return self.facts(facts, list(runs.loc[runs["method"] != NONE, "path"]))


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
