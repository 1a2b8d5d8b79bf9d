"""What the comparison writes: ``results.csv``, ``tables.md``, ``losses.png``, ``success.png`` and ``report.md``."""

from __future__ import annotations

import csv
import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.metaworld.compare_plots import loss_figure, success_figure
from experiments.metaworld.compare_runs import Variant
from experiments.metaworld.compare_statistics import (
    Interval,
    Run,
    Value,
    loss_after,
    over_seeds,
    over_tasks,
    paired,
    success,
)

if TYPE_CHECKING:
    from experiments.metaworld.compare import Settings

#: Method -> what it is compared with, run by run.
BASELINES = {"eva": "lora", "eva-dora": "dora"}


def write_report(
    settings: Settings,
    runs: Sequence[Run],
    rates: Mapping[str, float],
    scores: Mapping[str, Mapping[float, float]],
    tuning: Sequence[Run],
    failures: Sequence[tuple[str, str]],
) -> Path:
    """Write all files.

    Args:
        settings: What was asked for.
        runs: Metrics of the finished runs.
        rates: Learning rate of each method.
        scores: Of tuned methods: validation loss by learning rate.
        tuning: Metrics of the tuning runs.
        failures: Run and reason, of those that failed.

    Returns:
        The report.
    """
    folder = Path(settings.output)
    _write_csv(folder / "results.csv", settings, runs)
    tables = all_tables(settings, runs)
    (folder / "tables.md").write_text(tables, encoding="utf-8")
    labels = {variant.key: variant.label for variant in settings.variants}
    pictures = []
    if runs:
        loss_figure(runs, settings.task_names, labels, settings.val_steps).savefig(folder / "losses.png", dpi=120)
        pictures.append("![validation loss after each number of updates](losses.png)")
    if runs and settings.eval_episodes:
        success_figure(runs, settings.task_names, labels).savefig(folder / "success.png", dpi=120)
        pictures.append("![success of each method on each task](success.png)")
    parts = [
        "# Fine-tuning methods compared on Meta-World",
        _conditions(settings, runs, tuning),
        _failures(settings, runs, failures),
        "## In short",
        _in_short(settings, runs),
        "## Learning rates",
        _rates(settings, rates, scores),
        tables,
        *pictures,
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return report


def all_tables(settings: Settings, runs: Sequence[Run]) -> str:
    """Validation losses, success and paired differences, as Markdown."""
    parts = []
    steps = [step for step in settings.val_steps if step > 0]
    for task in settings.task_names:
        rows = [
            [variant.label, *(_cell(over_seeds(runs, task, variant.key, loss_after(step)), 4) for step in steps)]
            for variant in settings.variants
        ]
        start = [run for run in runs if run["task"] == task and run["method"] != "scratch"]
        before = f" (before training {loss_after(0)(start[0]):.4f}; scratch more)" if start else ""
        parts += [f"## Validation loss, {task}{before}", _table(["updates", *map(str, steps)], rows)]
    if settings.eval_episodes:
        rows = [
            [
                variant.label,
                *(_cell(over_seeds(runs, task, variant.key, success), 2) for task in settings.task_names),
                _cell(over_tasks(runs, settings.task_names, variant.key, success), 2),
            ]
            for variant in settings.variants
        ]
        parts += ["## Success after the last update", _table(["", *settings.task_names, "mean"], rows)]
    for first, second in pairs(settings.variants):
        parts += [f"## {first.label} minus {second.label}, run by run", _differences(settings, runs, first, second)]
    parts += ["## Size and time", _sizes(settings, runs)]
    return "\n\n".join(parts) + "\n"


def pairs(variants: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    """Which methods are compared run by run: EVA with LoRA, EVA+DoRA with DoRA."""
    by_method = {variant.method: variant for variant in variants}
    return [
        (variant, by_method[BASELINES[variant.method]])
        for variant in variants
        if BASELINES.get(variant.method) in by_method
    ]


def _differences(settings: Settings, runs: Sequence[Run], first: Variant, second: Variant) -> str:
    steps = [step for step in settings.val_steps if step > 0]

    def row(name: str, tasks: Sequence[str]) -> list[str]:
        losses = [paired(runs, tasks, first.key, second.key, loss_after(step), relative=True) for step in steps]
        cells = [_cell(each, 1, sign=True) for each in losses]
        if settings.eval_episodes:
            cells.append(_cell(paired(runs, tasks, first.key, second.key, success), 2, sign=True))
        return [name, *cells]

    head = ["", *(f"loss after {step}, %" for step in steps), *(["success"] if settings.eval_episodes else [])]
    rows = [row(task, [task]) for task in settings.task_names]
    return _table(head, [*rows, row("all tasks", settings.task_names)])


def _in_short(settings: Settings, runs: Sequence[Run]) -> str:
    steps = [step for step in settings.val_steps if step > 0]
    lines = []

    def sentence(first: Variant, second: Variant, what: str, value: Value, relative: bool) -> str | None:
        found = paired(runs, settings.task_names, first.key, second.key, value, relative)
        if found is None:
            return None
        verdict = "" if found.half is None else ", 0 excluded" if found.excludes_zero else ", 0 included"
        return f"{what} {found.text(1 if relative else 2, sign=True)}{' %' if relative else ''}{verdict}"

    for first, second in pairs(settings.variants):
        found = [sentence(first, second, f"loss after {step}", loss_after(step), relative=True) for step in steps]
        if settings.eval_episodes:
            found.append(sentence(first, second, "success", success, relative=False))
        kept = [text for text in found if text]
        if kept:
            lines.append(f"- {first.label} minus {second.label}, over the tasks: {'; '.join(kept)}.")
    note = (
        "± is half a 95% interval (t distribution) over seeds. Differences are taken within a seed; for losses they "
        "are 100 × the difference of logarithms, so about percent, negative where the first method is better. "
        "Intervals are for these tasks, and not corrected for the number of comparisons."
    )
    return "\n".join([*lines, "", note])


def _rates(settings: Settings, rates: Mapping[str, float], scores: Mapping[str, Mapping[float, float]]) -> str:
    grid = settings.learning_rates
    rows, edges = [], []
    for variant in settings.variants:
        worth = scores.get(variant.key, {})
        cells = []
        for lr in grid:
            text = f"{worth[lr]:.4f}" if lr in worth else ""
            cells.append(f"**{text}**" if text and lr == rates[variant.key] else text)
        rows.append([variant.label, f"{rates[variant.key]:g}", *cells])
        if worth and rates[variant.key] in (grid[0], grid[-1]):
            edges.append(variant.label)
    text = (
        f"Geometric mean over tasks of the validation loss after {settings.tune_steps} updates, on seeds that the "
        f"comparison does not use ({settings.tune_seeds}, from 100); the lowest is taken, by method."
    )
    if edges:
        text += f" At the edge of the grid, so perhaps not the best there is: {', '.join(edges)}."
    return f"{text}\n\n" + _table(["method", "chosen", *(f"{lr:g}" for lr in grid)], rows)


def _sizes(settings: Settings, runs: Sequence[Run]) -> str:
    def mean(found: Sequence[Run], name: str, digits: int) -> str:
        values = [float(run[name]) for run in found if run.get(name) is not None]
        return f"{sum(values) / len(values):,.{digits}f}" if values else ""

    rows = []
    for variant in settings.variants:
        found = [run for run in runs if run["variant"] == variant.key]
        ranks = [sum(run["ranks"].values()) for run in found if run.get("ranks")]
        rows.append(
            [
                variant.label,
                mean(found, "trainable_parameters", 0),
                f"{sum(ranks) / len(ranks):.0f}" if ranks else "",
                mean(found, "init_seconds", 2),
                mean(found, "train_seconds", 1),
                mean(found, "rollout_seconds", 1),
            ]
        )
    head = ["", "trained parameters", "ranks in all", "initialisation, s", "training, s", "rollouts, s"]
    return _table(head, rows)


def _conditions(settings: Settings, runs: Sequence[Run], tuning: Sequence[Run]) -> str:
    checkpoint = Path(settings.init)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]
    seconds = sum(float(run["seconds"]) for run in [*runs, *tuning])
    return (
        f"Each of {len(settings.variants)} methods fine-tunes {settings.init} (sha256 {digest}) on each of "
        f"{len(settings.task_names)} tasks with {settings.seeds} seeds: {settings.max_steps} updates at "
        f"{settings.batch_size} windows, {settings.train_episodes} demonstrations, cosine schedule, rank "
        f"{settings.rank} for every method with adapters (EVA's is a mean), embeddings frozen and without adapters, "
        f"action head trained in full. The validation loss is the mean squared error on {settings.val_episodes} "
        f"held-out demonstrations; success is the share of {settings.eval_episodes} episodes solved at any step of "
        f"{settings.horizon}, on evaluation goals that are the same for every run. Seeds change which windows are "
        "drawn, dropout, and the random parts of initialisations, but not the demonstrations. "
        f"{len(runs)} runs and {len(tuning)} tuning runs took {seconds / 60:.0f} process minutes; {os.cpu_count()} "
        f"cores ({platform.machine()}), one thread per run."
    )


def _failures(settings: Settings, runs: Sequence[Run], failures: Sequence[tuple[str, str]]) -> str:
    wanted = len(settings.variants) * len(settings.task_names) * settings.seeds
    if not failures:
        return "" if len(runs) == wanted else f"**Unfinished:** {len(runs)} of {wanted} runs."
    lines = [f"- {name}: {reason}" for name, reason in failures]
    return "\n".join([f"**{len(failures)} runs failed** and are not in the tables:", "", *lines])


def _write_csv(file: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """One line per run."""
    plain = ["task", "variant", "method", "rank", "rho", "seed", "lr"]
    measured = ["success_rate", "final_success_rate", "mean_return", "trainable_parameters", "init_seconds",
                "train_seconds", "rollout_seconds"]  # fmt: skip
    losses = [f"val_loss_{step}" for step in settings.val_steps]
    temporary = file.with_suffix(".part")
    with temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*plain, *losses, *measured])
        for run in runs:
            values: list[Any] = [run.get(name) for name in plain]
            values += [loss_after(step)(run) for step in settings.val_steps]
            writer.writerow([*values, *(run.get(name) for name in measured)])
    temporary.replace(file)


def _cell(interval: Interval | None, digits: int, sign: bool = False) -> str:
    if interval is None:
        return ""
    text = interval.text(digits, sign)
    return f"**{text}**" if sign and interval.excludes_zero else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
