"""The report of the Meta-World comparison: ``results.csv``, ``report.md`` and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from pandas import DataFrame

from eva_lightning.files import file_digest
from experiments.comparisons.figures import colours_of, curves_figure, differences_figure
from experiments.comparisons.metaworld import Settings
from experiments.comparisons.report import (
    SIGNIFICANCE,
    Evidence,
    Quantity,
    cell,
    difference_sentence,
    differences_table,
    learning_rates,
    machine,
    mean_column,
    means_table,
    significance_sentence,
    spread,
    state_of,
    table,
    write_report,
)
from experiments.runner.comparison import Results
from experiments.runner.statistics import PLUS_MINUS, iqm

SUCCESS = Quantity("success_rate", "success", 2, higher_is_better=True)


def write(settings: Settings, results: Results) -> Path:
    """Write all files; returns the report."""
    runs = spread(results.runs, "val_loss", "updates")
    evidence = Evidence.of(settings, runs)
    losses = {step: Quantity(f"val_loss_{step}", f"{step}", 4) for step in settings.val_steps}
    changes = [
        Quantity(f"val_loss_{step}", f"loss after {step}, %", 1, relative=True) for step in settings.val_steps
    ]
    quantities = [*changes, *([SUCCESS] if settings.eval_episodes else [])]
    texts = [
        "# Fine-tuning methods compared on Meta-World",
        _conditions(settings, results),
        state_of(results, len(settings.labels) * len(settings.task_names) * settings.seeds),
        "## In short",
        _in_short(evidence, quantities),
        "## Learning rates",
        learning_rates(
            settings,
            results,
            f"Geometric mean over tasks of the validation loss after {settings.tune_steps} steps",
            lambda score: f"{math.exp(score):.4f}",
        ),
        *_losses(settings, evidence, list(losses.values())),
        "losses",
        *(["## Success after the last step", _success(settings, evidence), "success"] if settings.eval_episodes else []),
        *_differences(settings, evidence, quantities),
        "differences",
        "## Size and time",
        _sizes(evidence),
    ]
    return write_report(settings.output, texts, _figures(settings, evidence, losses, quantities), runs)


def _figures(
    settings: Settings, evidence: Evidence, losses: Mapping[int, Quantity], quantities: Sequence[Quantity]
) -> dict[str, tuple[Figure, str]]:
    figures: dict[str, tuple[Figure, str]] = {}
    if not evidence.labels:
        return figures
    panels = {task: evidence.on(task) for task in settings.task_names}
    curves = curves_figure(panels, losses, "steps", "validation loss", log_y=True)
    figures["losses"] = curves, "validation loss after each number of steps"
    if settings.eval_episodes:
        figures["success"] = success_figure(evidence, settings.task_names), "success of each method on each task"
    if others := [key for key in evidence.against_reference if key != "scratch"]:
        figures["differences"] = differences_figure(evidence, quantities, others), "differences to LoRA over the tasks"
    return figures


def success_figure(evidence: Evidence, tasks: Sequence[str]) -> Figure:
    """Bars of mean success by method with 95% intervals, one group per task and one for their mean; a dot per seed."""
    groups = {task: evidence.on(task) for task in tasks} | ({"mean": evidence} if len(tasks) > 1 else {})
    figure = Figure(figsize=(1.6 + 2.1 * len(groups), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width, colours = 0.84 / len(evidence.labels), colours_of(list(evidence.labels))
    for place, (key, label) in enumerate(evidence.labels.items()):
        axes.bar([0], [0], color=colours[key], label=label)
        for number, (group, found) in enumerate(groups.items()):
            x = number + (place - (len(evidence.labels) - 1) / 2) * width
            interval = found.mean(key, SUCCESS)
            if interval is None:
                continue
            half = interval.half or 0.0
            axes.bar(x, interval.mean, width=0.92 * width, color=colours[key], zorder=2)
            axes.errorbar(x, interval.mean, yerr=[[min(half, interval.mean)], [min(half, 1 - interval.mean)]],
                          color="#1c1c1c", linewidth=0.9, capsize=2, zorder=4)  # fmt: skip
            if group != "mean":
                dots = found.runs.loc[found.runs["method"] == key, SUCCESS.column]
                axes.plot([x] * len(dots), dots, "o", color="white", markeredgecolor="#1c1c1c", markeredgewidth=0.5,
                          markersize=2.8, zorder=3)  # fmt: skip
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("success (share of episodes)")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    return figure


def _losses(settings: Settings, evidence: Evidence, losses: Sequence[Quantity]) -> list[str]:
    parts = []
    for task in settings.task_names:
        found = evidence.on(task)
        start = found.runs.loc[found.runs["method"] != "scratch", "val_loss_0"]
        before = f" (before training {start.iloc[0]:.4f}; from scratch more)" if len(start) else ""
        parts += [f"## Validation loss, {task}{before}", means_table(found, losses, "steps")]
    return parts


def _success(settings: Settings, evidence: Evidence) -> str:
    columns = [*(evidence.on(task) for task in settings.task_names), evidence]
    rows = {
        label: [*(cell(found.mean(key, SUCCESS), 2) for found in columns), _interquartile(evidence.runs, key)]
        for key, label in evidence.labels.items()
    }
    text = (
        f"{PLUS_MINUS} The interquartile mean (IQM) of all runs leaves out the best and the worst quarter; its interval is "
        "a 95% bootstrap interval, stratified by task."
    )
    return f"{text}\n\n" + table("", [*settings.task_names, "mean", "IQM"], rows)


def _interquartile(runs: DataFrame, method: str) -> str:
    scores = runs[runs["method"] == method].pivot_table(SUCCESS.column, "seed", "task").dropna()
    if not len(scores):
        return ""
    mean, low, high = iqm(scores.to_numpy())
    return f"{mean:.2f} ({low:.2f} to {high:.2f})"


def _differences(settings: Settings, evidence: Evidence, quantities: Sequence[Quantity]) -> list[str]:
    parts = []
    for first, second in evidence.pairs:
        found = {task: evidence.on(task) for task in settings.task_names} | {"all tasks": evidence}
        rows = {
            name: [cell(each.difference(first, second, what), what.digits, sign=True) for what in quantities]
            for name, each in found.items()
        }
        title = f"## {evidence.labels[first]} minus {evidence.labels[second]}, run by run"
        parts += [title, table("", [each.title for each in quantities], rows)]
    others = evidence.against_reference
    if others:
        parts += ["## Minus LoRA over the tasks, run by run", differences_table(evidence, quantities, others)]
    return parts


def _in_short(evidence: Evidence, quantities: Sequence[Quantity]) -> str:
    lines: list[str] = []
    for first, second in evidence.pairs:
        lines += difference_sentence(evidence, first, second, quantities)
    for quantity in quantities:
        lines += significance_sentence(evidence, quantity, evidence.against_reference)
    note = (
        "Differences of losses are 100 × the difference of logarithms, so about percent, negative where the first method "
        "is better. All are means over the tasks, and intervals are for these tasks."
    )
    return "\n".join([*lines, "", f"{SIGNIFICANCE} {note}"])


def _sizes(evidence: Evidence) -> str:
    columns = {
        "trained parameters": ("trainable_parameters", 0),
        "ranks in all": ("total_rank", 0),
        "initialisation, s": ("init_seconds", 2),
        "training, s": ("train_seconds", 1),
        "rollouts, s": ("rollout_seconds", 1),
    }
    runs = evidence.runs
    if "ranks" in runs:
        runs = runs.assign(total_rank=[sum(ranks.values()) if isinstance(ranks, dict) else None for ranks in runs["ranks"]])
    rows = {
        label: [mean_column(runs, key, column, digits) for column, digits in columns.values()]
        for key, label in evidence.labels.items()
    }
    return table("", columns, rows)


def _conditions(settings: Settings, results: Results) -> str:
    return (
        f"Each of {len(settings.labels)} methods fine-tunes {settings.init} (sha256 {file_digest(settings.init)[:12]}) on "
        f"each of {len(settings.task_names)} tasks with {settings.seeds} seeds: {settings.max_steps} steps at "
        f"{settings.batch_size} windows, {settings.train_episodes} demonstrations, cosine schedule, rank "
        f"{settings.rank} for every method with adapters (EVA's is a mean), embeddings frozen and without adapters, "
        f"action head trained in full. The validation loss is the mean squared error on {settings.val_episodes} "
        f"held-out demonstrations; success is the share of {settings.eval_episodes} episodes solved at any step of "
        f"{settings.horizon}, on evaluation goals that are the same for every run. Seeds change which windows are "
        "drawn, dropout, and the random parts of initialisations, but not the demonstrations. "
        f"{len(results.runs)} runs and {len(results.tuning)} tuning runs took {results.seconds / 60:.0f} process "
        f"minutes; {machine()}, one thread per run."
    )
