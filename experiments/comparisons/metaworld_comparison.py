"""The Meta-World comparison as the runner takes it: what it needs, its runs, how long they take, its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from eva_lightning.rl.module import read_checkpoint
from experiments.comparisons import looks_report, metaworld_plan, metaworld_report
from experiments.comparisons.metaworld import BEFORE, Settings
from experiments.comparisons.metaworld_plan import Speed, check_demonstrations
from experiments.comparisons.report import REPORT_FILES
from experiments.comparisons.search import SELECTED_BY
from experiments.comparisons.search_report import score_in_words
from experiments.comparisons.settings import Part, adapts, method_cells
from experiments.comparisons.tuned import no_jobs
from experiments.metaworld import before_run, finetune_run
from experiments.metaworld.before import RolloutSettings
from experiments.metaworld.finetune import EXPERIMENT
from experiments.metaworld.measures import success_text
from experiments.runner.cells import Cell
from experiments.runner.comparison import Comparison, Results, run_comparison
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.loggers import check_loggers, parse_loggers
from experiments.runner.run_folder import Work

#: Seconds that a run takes besides steps and rollouts: loading, EVA's streaming, validation losses.
_PER_RUN = 2.0


def build(job: Job) -> Work:
    """The work of a job whose settings are those of one fine-tuning.

    Its metrics say that a tuning run is one, so that tables leave it out, and that ρ was tuned, so that tables have one
    line of EVA whatever came out.
    """
    work = finetune_run.build(job.settings)
    said: dict[str, Any] = {"experiment": f"{EXPERIMENT}-tuning"} if job.phase == "tune" else {}
    if job.tags.get("rho_tuned"):
        said["rho_tuned"] = True
    return lambda folder: {**work(folder), **said}


def build_before(job: Job) -> Work:
    """The rollouts of a job whose settings are those of the network before fine-tuning."""
    return before_run.build(job.settings)


class MetaWorld(Comparison):
    """All methods fine-tune one pre-trained network on every task.

    Args:
        settings: What to compare.
    """

    name = "compare"
    modules = ("peft", "experiments.metaworld.finetune_run")
    files = (*REPORT_FILES, "choices.csv", "losses.png", "success.png", "differences.png", *looks_report.FIGURES)

    def __init__(self, settings: Settings) -> None:
        self.settings = self.options = settings

    def check(self) -> None:
        """Refuse a checkpoint or demonstrations that are missing; a plan says what is."""
        settings = self.settings
        check_loggers(parse_loggers(settings.logger))
        if settings.plan:
            return
        read_checkpoint(settings.init)
        check_demonstrations(settings)

    def cells(self) -> list[Cell]:
        return [*self._cells_before(), *self._method_cells()]

    def _method_cells(self) -> list[Cell]:
        return method_cells(self.settings, self._jobs)

    def _cells_before(self) -> list[Cell]:
        """Of the network before fine-tuning, once for each number of demonstrations: their best return is asked for."""
        settings = self.settings

        def cell(number: int) -> Cell:
            def final(point: Point) -> list[Job]:
                return [self._job_before(task, number) for task in settings.task_names]

            return Cell(Part(BEFORE, demonstrations=number).name, [], no_jobs, final, Point.of())

        return [cell(number) for number in settings.numbers if number is not None] if settings.zero_shot else []

    def _job_before(self, task: str, number: int) -> Job:
        settings = self.settings
        tags = {"task": task, "method": BEFORE, "seed": 0, "demonstrations": number}
        text = f"{task}, before fine-tuning, {number} demonstrations"
        return Job(build_before, settings.before(task, number), settings.output, "final", tags, text)

    def _jobs(self, part: Part, phase: Phase, point: Point, seed: int) -> list[Job]:
        settings, method = self.settings, part.method
        rank = settings.rank_of(part, point) if adapts(method) else None
        rho, lr = settings.rho_of(part, point), point.get("lr")
        tags = {"method": method, "rank": rank, "rho": rho, "seed": seed, "lr": lr}
        text = settings.labels[method]
        if settings.ranks and rank is not None:
            text += f", rank {rank}"
        if settings.searches_rho(method):
            text += f", ρ = {rho:g}"
            tags["rho_tuned"] = True
        if part.demonstrations is not None:
            text += f", {part.demonstrations} demonstrations"
            tags["demonstrations"] = part.demonstrations
        tasks = settings.tuning_tasks if phase == "tune" else settings.task_names
        return [
            Job(
                build,
                settings.run(part, phase, point, seed, task),
                settings.output,
                phase,
                {"task": task, **tags},
                f"{task}, {text}, lr {lr:g}, seed {seed}",
                order=seed,
            )
            for task in (tasks if part.task is None else (part.task,))
        ]

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Logarithm of the last validation loss: tasks of different scale count alike in its mean; success before it
        where that is what is chosen by."""
        loss = math.log(metrics["val_loss"][-1]["val_loss"])
        column = SELECTED_BY[self.settings.select]
        if column is None:
            return (loss,)
        rate = metrics[column]
        return (math.inf if rate is None else -rate, loss)

    def in_words(self, score: tuple[float, ...]) -> str:
        """What a choice was made by."""
        return score_in_words(score)

    def headline(self, metrics: Mapping[str, Any]) -> str:
        if "val_loss" not in metrics:
            return f"success: {success_text(metrics)}"
        success = "" if metrics["success_rate"] is None else f", success: {success_text(metrics)}"
        return f"validation loss {metrics['val_loss'][-1]['val_loss']:.4f}{success}"

    def seconds(self) -> Callable[[Job], float]:
        """By steps of a method and rolled-out episodes, timed now."""
        self._speed = speed = Speed(self.settings)

        def seconds(job: Job) -> float:
            run = job.settings
            if isinstance(run, RolloutSettings):
                return run.episodes * speed.episode + _PER_RUN
            episodes = run.eval_episodes * (1 + len(run.look_steps))
            return run.max_steps * speed.step(run.method) + episodes * speed.episode + _PER_RUN

        return seconds

    def plan_notes(self) -> list[str]:
        return metaworld_plan.notes(self.settings, self._speed, self._method_cells())

    def report(self, results: Results) -> None:
        write = looks_report.write if self.settings.looks else metaworld_report.write
        print(f"report: {write(self.settings, results)}")


def run(settings: Settings) -> Results:
    return run_comparison(MetaWorld(settings))
