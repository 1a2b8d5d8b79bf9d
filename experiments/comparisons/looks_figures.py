"""Figures of success over looks: a panel per task, and interquartile means with their intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.comparisons.evidence import REFERENCE
from experiments.comparisons.figures import colours_of, explained
from experiments.comparisons.metaworld import BEFORE
from experiments.metaworld.success import Definition
from experiments.runner.statistics import Range

_COLUMNS = 5
_BEFORE_COLOUR = "#6b7280"


def looks_figure(looks: Sequence[Any], tasks: Sequence[str], definition: Definition) -> Figure:
    """Mean success over seeds at each look: a block of panels for each number of demonstrations, a panel per task.

    The network before fine-tuning is a dashed line.

    Args:
        looks: :class:`~experiments.comparisons.looks_report.Setting`, by number of demonstrations and step.
        tasks: Full names.
        definition: Of success.
    """
    numbers = list(dict.fromkeys(look.number for look in looks))
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.1 * rows * len(numbers) + 0.7), layout="constrained")
    axes = figure.subplots(rows * len(numbers), columns, sharex=True, sharey=True, squeeze=False)
    for block, number in enumerate(numbers):
        of_number = [look for look in looks if look.number == number]
        panels = list(axes[block * rows : (block + 1) * rows].flat)
        for panel in panels[len(tasks) :]:
            panel.set_visible(False)
        for panel, task in zip(panels, tasks, strict=False):
            _task_panel(panel, of_number, task, definition)
            panel.set_title(f"{task.removesuffix('-v3')}, {number} demonstrations", fontsize="x-small", loc="left")
    explained(figure, *axes[0][0].get_legend_handles_labels())
    figure.supxlabel("step", fontsize="small")
    figure.supylabel(f"success {definition.phrase} (share of episodes)", fontsize="small")
    return figure


def _task_panel(panel: Axes, looks: Sequence[Any], task: str, definition: Definition) -> None:
    steps = [look.step for look in looks]
    labels = looks[0].evidence.labels
    colours = colours_of([key for key in labels if key != BEFORE])
    for place, (key, label) in enumerate(labels.items()):
        found = [look.success(definition) for look in looks]
        means = [runs.loc[(runs["task"] == task) & (runs["method"] == key), "value"].mean() for runs in found]
        if key == BEFORE:
            panel.axhline(means[0], color=_BEFORE_COLOUR, linestyle="--", linewidth=1.0, label=label)
            continue
        shift = 1.03 ** (place - len(labels) / 2)  # side by side, not on top of each other
        width = 2.2 if key == REFERENCE else 1.3
        panel.plot([step * shift for step in steps], means, "o-", markersize=3, linewidth=width,
                   color=colours[key], label=label)  # fmt: skip
    panel.set_xscale("log")
    panel.set_xticks(steps, list(map(str, steps)))
    panel.minorticks_off()
    panel.set_xlim(steps[0] / 1.5, steps[-1] * 1.5)
    panel.set_ylim(-0.05, 1.05)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize="x-small")


def iqm_figure(panels: Mapping[str, Mapping[Any, Range]], labels: Mapping[str, str], definition: Definition) -> Figure:
    """One row per method, one panel per number of demonstrations and look: the interquartile mean and its interval."""
    figure = Figure(figsize=(1.6 + 2.0 * len(panels), 1.1 + 0.27 * len(labels)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = {BEFORE: _BEFORE_COLOUR, **colours_of([key for key in labels if key != BEFORE])}
    for panel, (title, found) in zip(axes, panels.items(), strict=True):
        for place, key in enumerate(labels):
            if key not in found:
                continue
            middle = found[key]
            panel.plot([middle.low, middle.high], [-place, -place], color=colours[key], linewidth=5, alpha=0.45,
                       solid_capstyle="butt")  # fmt: skip
            panel.plot([middle.mean], [-place], "|", color=colours[key], markersize=11, markeredgewidth=2.2)
        panel.set_title(textwrap.fill(title, 20), fontsize="small")
        panel.set_xlim(-0.02, 1.02)
        panel.set_ylim(0.5 - len(labels), 0.5)
        panel.grid(axis="x", alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(labelsize="x-small")
    axes[0].set_yticks([-place for place in range(len(labels))], list(labels.values()), fontsize="small")
    marks = [
        Line2D([], [], color=_BEFORE_COLOUR, marker="|", markersize=11, markeredgewidth=2.2, linestyle="none"),
        Line2D([], [], color=_BEFORE_COLOUR, linewidth=5, alpha=0.45),
    ]
    explained(figure, marks, ("interquartile mean", "its 95% interval (stratified bootstrap)"))
    figure.supxlabel(f"success {definition.phrase} (share of episodes)", fontsize="small")
    return figure
