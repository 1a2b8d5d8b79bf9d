"""From the runs of the robots comparison to its tables and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from eva_lightning import plots
from experiments.comparisons.robots_settings import Settings
from experiments.metaworld.measures import EPISODE_BRACKETS, success_range
from experiments.metaworld.success import HEADLINE, PAPER_NOTE, definitions
from experiments.report import page
from experiments.report.epochs import COLOURED, by_mean, in_order, label, methods_of, verdict
from experiments.runner.statistics import PLUS_MINUS, Interval
from experiments.runner.tables import NOTHING

#: What methods are compared by first of all, and their learning rates are chosen by: one measure for both.
CRITERION = "validation loss after the last step divided by that before training"


def short(task: str) -> str:
    """Without the version."""
    return task.removesuffix("-v3")


def loss_left(losses: Sequence[Mapping[str, float]]) -> float:
    """The validation loss after the last step divided by that before training."""
    return losses[-1]["val_loss"] / losses[0]["val_loss"]


def results_table(options: Settings, task: str, before: pd.DataFrame, after: pd.DataFrame) -> page.Table:
    """The network before fine-tuning, then a row per method. Seconds are medians."""
    runs, start = after[after["task"] == task], before[before["task"] == task]
    curves = {method: losses_of(runs, method) for method in methods_of(runs)}
    before_training = next(iter(curves.values())).mean(axis=0)[0]
    columns = [f"Step {step}" for step in options.shown_updates]
    first = {columns[0]: f"{before_training:.4f}", "Success": success(start)}
    rows: dict[str, dict[str, str]] = {"pre-trained": first}
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
            "Success": success(group),
        }
    notes = (
        f"Loss: squared error of the actions on {options.held_out} held-out demonstrations.",
        PLUS_MINUS,
        f"Success: solved at any step of the episode, and still at its last; {EPISODE_BRACKETS}.",
        PAPER_NOTE,
        f"Trained: parameters, with the action head, and the median time of {options.updates} steps.",
        "The time includes EVA's initialisation and the validation losses.",
    )
    cells = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=["Rate", "Trained", *columns, "Success"])
    return page.Table(f"{short(task)}: validation loss and success", cells.fillna("").rename_axis("Method"), notes)


def headlines(options: Settings, task: str, before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """The criterion of every method, the best first, and how many episodes were solved before and after."""
    start, runs = before[before["task"] == task], after[after["task"] == task]
    left = {m: [loss_left(losses) for losses in runs.loc[runs["method"] == m, "val_loss"]] for m in methods_of(runs)}
    ordered = by_mean({method: float(np.mean(values)) for method, values in left.items()})
    losses = ", ".join(f"{label(method)} {Interval.of(left[method]).text(3)}" for method in ordered)
    groups = {"pre-trained": start} | {label(method): runs[runs["method"] == method] for method in left}
    solved = ", ".join(f"{name} {_solved(group)}" for name, group in groups.items())
    pairs = [(method, "lora") for method in ordered if method.startswith("eva") and "lora" in left]
    return [
        *(_against(short(task), runs, left, *pair) for pair in pairs),
        f"{short(task)}, {CRITERION} ({options.updates} steps): {losses}.",
        f"{short(task)}, episodes solved {HEADLINE.phrase}: {solved}.",
    ]


def _against(task: str, runs: pd.DataFrame, left: Mapping[str, list[float]], method: str, baseline: str) -> str:
    """What the criterion says about two methods, seed by seed."""
    ours, theirs = (dict(zip(runs.loc[runs["method"] == m, "seed"], left[m], strict=True)) for m in (method, baseline))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return f"{task}: no seed has both {label(method)} and {label(baseline)}."
    found = Interval.of(differences)
    return (
        f"{task}, {label(method)} against {label(baseline)}, {CRITERION}, over {len(differences)} paired seeds: "
        f"{found.text(3, sign=True)}, {verdict(found)}."
    )


def _solved(runs: pd.DataFrame) -> str:
    # a run that diverged was not rolled out
    rolled_out = [run for run in runs.get(HEADLINE.episodes, ()) if isinstance(run, list)]
    episodes = [bool(solved) for run in rolled_out for solved in run]
    return f"{sum(episodes)} of {len(episodes)}"


def success(runs: pd.DataFrame) -> str:
    """How many of all episodes are solved, with Wilson's interval of their share, by both definitions."""
    lines = []
    for definition in definitions():
        found_in = runs[definition.episodes].tolist() if definition.episodes in runs else []
        episodes = [run for run in found_in if isinstance(run, list)]
        if len(episodes) < len(runs):  # runs made earlier lack one
            lines.append(f"{definition.short} {NOTHING}")
            continue
        found = success_range([solved for run in episodes for solved in run])
        lines += [
            f"{definition.short} {round(found.mean * found.n)} of {found.n}",
            f"[{found.low:.2f}, {found.high:.2f}]",
        ]
    return "\n".join(lines)


def losses_of(runs: pd.DataFrame, method: str) -> np.ndarray:
    """Validation losses ``(seeds, steps)``."""
    rows = runs[runs["method"] == method].sort_values("seed")["val_loss"]
    return np.array([[entry["val_loss"] for entry in losses] for losses in rows])


def curve_figure(options: Settings, task: str, runs: pd.DataFrame) -> page.Figure:
    here = runs[runs["task"] == task]
    lines = {label(method): losses_of(here, method) for method in methods_of(here)}
    last = in_order({name: float(values[:, -1].mean()) for name, values in lines.items()}, ".4f")
    figure = plots.learning_curves(
        lines, "squared error of the actions", xlabel="step", title=short(task), order=COLOURED, x=options.noted_updates
    )
    alt = f"Validation loss on {short(task)}; after {options.updates} steps, the lowest first: {last}"
    return page.drawn(figure, alt, "Line: mean over seeds; band: 95% interval.")
