"""One picture per group of tasks: accuracies of all methods with 95% intervals, the paper's hollow and ours solid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eva_lightning.methods.keys import METHOD_TRAITS
from experiments.runner.statistics import Interval
from experiments.vtab.table_layout import Notes, Samples, mean_interval
from experiments.vtab.table_paper import GROUP_HEADINGS, GROUPS, HEADINGS, paper_lines
from experiments.vtab.table_results import Ours

_OURS = "#1f5f9c"
_PAPER = "#5b6770"


@dataclass(frozen=True)
class _Row:
    """One method on the vertical axis: our results, the paper's, or both."""

    label: str
    ours: Samples
    paper: Samples


def group_figures(ours: Sequence[Ours], notes: Notes) -> dict[str, Figure]:
    """Group -> picture with a panel per task and one for their mean; "average" -> the means of groups and of all."""
    rows = _rows(ours, notes)
    figures = {}
    for group, tasks in GROUPS.items():
        if group == "average":
            panels: dict[str, tuple[str, ...]] = {GROUP_HEADINGS[each]: GROUPS[each] for each in GROUPS}
        else:
            panels = {**{HEADINGS[task]: (task,) for task in tasks}, f"{GROUP_HEADINGS[group]}, mean": tasks}
        figures[group] = _figure(rows, panels)
    return figures


def _rows(ours: Sequence[Ours], notes: Notes) -> list[_Row]:
    printed = {line.method: line.samples for line in paper_lines() if line.samples}
    rows = []
    for method, traits in METHOD_TRAITS.items():
        entries = [entry for entry in ours if entry.key.method == method]
        for entry in entries:
            marks = notes.marks(entry.notes)
            label = entry.label + (f" [{marks}]" if marks else "")
            rows.append(_Row(label, entry.samples, printed.get(method, {})))
        if not entries and method in printed:
            rows.append(_Row(traits.label, {}, printed[method]))
    return rows


def _figure(rows: Sequence[_Row], panels: Mapping[str, Sequence[str]]) -> Figure:
    columns = 4 if len(panels) % 4 == 0 else 5  # 4, 5, 8 or 9 panels
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.0 + 2.5 * columns, 0.7 + lines * (0.75 + 0.27 * len(rows))), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (title, tasks) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, title, rows, tasks)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    names = [row.label for row in rows]
    grid.flat[0].set_yticks(range(len(rows)), names)
    grid.flat[0].set_ylim(len(rows) - 0.4, -0.6)
    text = "accuracy (%), 95% intervals over seeds (cut at the frame where they are wider)"
    if any(len(tasks) > 1 for tasks in panels.values()):
        text += "; n/m: mean over n of m tasks, the paper's over the same"
    figure.supxlabel(text, fontsize="small")
    marks = [
        grid.flat[0].errorbar([], [], xerr=[], **_style(ours=False)),
        grid.flat[0].errorbar([], [], xerr=[], **_style(ours=True)),
    ]
    labels = ["paper, DINOv2-g/14", "ours"]
    figure.legend(marks, labels, loc="outside upper right", ncols=2, frameon=False, fontsize="small")
    return figure


def _panel(axes: Axes, title: str, rows: Sequence[_Row], tasks: Sequence[str]) -> None:
    means = []
    for place, row in enumerate(rows):
        # next to each other where there are both; the paper's mean over the tasks that ours is over
        shared = [task for task in tasks if not row.ours or task in row.ours]
        both = any(task in row.ours for task in tasks)
        for ours, samples, shift in ((False, row.paper, -0.17 * both), (True, row.ours, 0.17)):
            interval, known = mean_interval(samples, shared)
            if interval is None:
                continue
            means.append(interval.mean)
            _mark(axes, interval, place + shift, ours)
            if 0 < known < len(tasks) and ours:
                axes.annotate(
                    f"{known}/{len(tasks)}", (interval.mean + (interval.half or 0.0), place + shift), xytext=(5, 0),
                    textcoords="offset points", fontsize="xx-small", va="center", color=_OURS, annotation_clip=True,
                )  # fmt: skip
    low, high = min(means, default=0.0), max(means, default=100.0)
    margin = max(0.12 * (high - low), 0.5)
    axes.set_xlim(low - margin, min(high + margin, 100.5))
    axes.set_title(title, fontsize="small", loc="left")
    axes.tick_params(axis="x", labelsize="x-small")
    axes.tick_params(axis="y", length=0, labelsize="small")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    for place in range(1, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#000000", alpha=0.035, linewidth=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _mark(axes: Axes, interval: Interval, y: float, ours: bool) -> None:
    axes.errorbar(interval.mean, y, xerr=interval.half, **_style(ours))


def _style(ours: bool) -> dict[str, Any]:
    color = _OURS if ours else _PAPER
    return {
        "color": color, "marker": "o" if ours else "D", "markersize": 4.2, "markeredgewidth": 0.9,
        "markerfacecolor": color if ours else "white", "elinewidth": 0.9, "capsize": 1.8, "linestyle": "none",
    }  # fmt: skip
