"""One figure per group of tasks: accuracies of all methods with 95% intervals, the paper's hollow and ours solid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eva_lightning.methods.registry import METHODS
from experiments.vtab.table_layout import Notes, Samples, mean_interval
from experiments.vtab.table_paper import GROUP_HEADINGS, GROUPS, HEADINGS, paper_lines
from experiments.vtab.table_results import Ours

_OURS: dict[str, Any] = {"color": "#1f5f9c", "markerfacecolor": "#1f5f9c", "marker": "o"}
_PAPER: dict[str, Any] = {"color": "#5b6770", "markerfacecolor": "white", "marker": "D"}
_MARK: dict[str, Any] = {
    "markersize": 4.2, "markeredgewidth": 0.9, "elinewidth": 0.9, "capsize": 1.8, "linestyle": "none",
}  # fmt: skip


class _Row(NamedTuple):
    """One method on the vertical axis: our results, the paper's, or both."""

    label: str
    ours: Samples
    paper: Samples


def group_figures(ours: Sequence[Ours], notes: Notes) -> dict[str, Figure]:
    """File name -> figure: of each group a panel per task and one for their mean; of "average" the means."""
    rows = list(_rows(ours, notes))
    figures = {}
    for group, tasks in GROUPS.items():
        if group == "average":
            panels: dict[str, tuple[str, ...]] = {GROUP_HEADINGS[each]: GROUPS[each] for each in GROUPS}
        else:
            panels = {**{HEADINGS[task]: (task,) for task in tasks}, f"{GROUP_HEADINGS[group]}, mean": tasks}
        figures[f"{group}.png"] = _figure(rows, panels)
    return figures


def _rows(ours: Sequence[Ours], notes: Notes) -> Iterator[_Row]:
    printed = {method: line.samples for method, line in paper_lines().items() if line.samples}
    for name, method in METHODS.items():
        entries = [entry for entry in ours if entry.key.method == name]
        for entry in entries:
            marks = notes.marks(entry.notes)
            yield _Row(entry.label + (f" [{marks}]" if marks else ""), entry.samples, printed.get(name, {}))
        if not entries and name in printed:
            yield _Row(method.label, {}, printed[name])


def _figure(rows: Sequence[_Row], panels: Mapping[str, Sequence[str]]) -> Figure:
    columns = 4 if len(panels) % 4 == 0 else 5  # 4, 5, 8 or 9 panels
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.0 + 2.5 * columns, 0.7 + lines * (0.75 + 0.27 * len(rows))), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes, (title, tasks) in zip(grid, panels.items(), strict=False):
        _panel(axes, title, rows, tasks)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_yticks(range(len(rows)), [row.label for row in rows])
    grid[0].set_ylim(len(rows) - 0.4, -0.6)
    text = "accuracy (%), 95% intervals over seeds (cut at the frame where they are wider)"
    if any(len(tasks) > 1 for tasks in panels.values()):
        text += "; n/m: mean over n of m tasks, the paper's over the same"
    figure.supxlabel(text, fontsize="small")
    marks = [grid[0].errorbar([], [], xerr=[], **style, **_MARK) for style in (_PAPER, _OURS)]
    place: dict[str, Any] = {"loc": "outside upper right", "ncols": 2, "frameon": False, "fontsize": "small"}
    figure.legend(marks, ["paper, DINOv2-g/14", "ours"], **place)
    return figure


def _panel(axes: Axes, title: str, rows: Sequence[_Row], tasks: Sequence[str]) -> None:
    means = []
    for place, row in enumerate(rows):
        # next to each other where there are both; the paper's mean over the tasks that ours is over
        shared = [task for task in tasks if not row.ours or task in row.ours]
        both = any(task in row.ours for task in tasks)
        for style, samples, shift in ((_PAPER, row.paper, -0.17 * both), (_OURS, row.ours, 0.17)):
            interval, known = mean_interval(samples, shared)
            if interval is None:
                continue
            means.append(interval.mean)
            axes.errorbar(interval.mean, place + shift, xerr=interval.half, **style, **_MARK)
            if known < len(tasks) and style is _OURS:
                axes.annotate(
                    f"{known}/{len(tasks)}", (interval.mean + (interval.half or 0.0), place + shift), xytext=(5, 0),
                    textcoords="offset points", fontsize="xx-small", va="center", color=style["color"],
                    annotation_clip=True,
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
