"""Figures of all comparisons: a quantity during training, and differences to the reference, with 95% intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.comparisons.evidence import REFERENCE, Evidence, Quantity
from experiments.runner.statistics import Interval

#: Colours of differences, and what they mean.
_DIFFERENCES = {"better": "#1f5f9c", "worse": "#c0392b", "no significant difference": "#9aa5ab"}
COLOURS = ("#9aa5ab", "#1c1c1c", "#c9a227", "#7db4e0", "#1f5f9c", "#2a9d6f", "#8e63b0")
REFERENCE_COLOUR = "#d1603d"
LOG_TICKS = [step * 10**decade for decade in range(-4, 2) for step in (1, 1.5, 2, 3, 5, 7)]


def colours_of(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method, the reference's always the same."""
    others = cycle(COLOURS)
    return {key: REFERENCE_COLOUR if key == REFERENCE else next(others) for key in methods}


def curves_figure(
    panels: Mapping[str, Evidence], quantities: Mapping[int, Quantity], x_label: str, y_label: str, log_y: bool = False
) -> Figure:
    """A quantity during training: its mean and 95% interval, one panel per group of methods or per task.

    Args:
        panels: Title -> what is drawn there.
        quantities: When (an epoch, a number of steps) -> the quantity then.
        x_label, y_label: Names of the axes.
        log_y: Logarithmic y axis, beside the x axis.
    """
    figure, axes = _panels(len(panels))
    for panel, (title, evidence) in zip(axes, panels.items(), strict=True):
        colours = colours_of(list(evidence.labels))
        means = {x: evidence.means(quantity) for x, quantity in quantities.items()}
        for place, (key, label) in enumerate(evidence.labels.items()):
            known = {x: found[key] for x, found in means.items() if key in found}
            # side by side, not on top of each other
            shift = 1.015 ** (place - len(evidence.labels) / 2)
            _curve(panel, {x * shift: interval for x, interval in known.items()}, log_y, label=label,
                   color=colours[key], linewidth=2.2 if key == REFERENCE else 1.3)  # fmt: skip
        panel.set_xscale("log")
        if log_y:
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            ticks = [tick for tick in LOG_TICKS if low <= tick <= high]
            panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks(list(quantities), list(map(str, quantities)))
        panel.minorticks_off()
        panel.set(xlabel=x_label, ylabel=y_label)
        panel.set_title(title, fontsize="medium", loc="left")
        panel.legend(frameon=False, fontsize="x-small", ncols=2 if len(evidence.labels) > 6 else 1)
    return figure


def _curve(panel: Axes, points: Mapping[float, Interval], log_y: bool, **style: Any) -> None:
    means = [interval.mean for interval in points.values()]
    halves = [interval.half or 0.0 for interval in points.values()]
    if log_y:
        halves = [min(half, 0.9 * mean) for half, mean in zip(halves, means, strict=True)]
    panel.errorbar(list(points), means, yerr=halves, marker="o", markersize=3, elinewidth=0.9, capsize=1.5, **style)


def differences_figure(evidence: Evidence, quantities: Sequence[Quantity], methods: Sequence[str]) -> Figure:
    """One row per method, one panel per quantity: the difference to the reference and its 95% interval.

    Intervals that exclude 0 are blue where the method is better than the reference and red where it is worse.
    """
    figure = Figure(figsize=(1.6 + 1.75 * len(quantities), 1.0 + 0.25 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for panel, quantity in zip(panels, quantities, strict=True):
        for place, key in enumerate(methods):
            interval = evidence.difference(key, REFERENCE, quantity)
            if interval is None:
                continue
            better = interval.mean > 0 if quantity.higher_is_better else interval.mean < 0
            meaning = ("better" if better else "worse") if interval.excludes_zero else "no significant difference"
            panel.errorbar(
                interval.mean, -place, xerr=interval.half or 0.0, color=_DIFFERENCES[meaning], marker="o",
                markersize=3.5, elinewidth=1.3, capsize=2,
            )  # fmt: skip
        panel.axvline(0.0, color=REFERENCE_COLOUR, linewidth=1.0, zorder=0)
        panel.set_title(textwrap.fill(quantity.heading, 18), fontsize="small")
        panel.tick_params(labelsize="x-small")
        panel.grid(axis="x", alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_ylim(0.5 - len(methods), 0.5)
    labels = [evidence.labels[key] for key in methods]
    marks = [Line2D([], [], color=colour, marker="o", markersize=3.5) for colour in _DIFFERENCES.values()]
    explained(figure, marks, list(_DIFFERENCES))
    panels[0].set_yticks([-place for place in range(len(methods))], labels, fontsize="small")
    figure.supxlabel(f"difference to {evidence.labels[REFERENCE]} (mean, 95% interval)", fontsize="small")
    return figure


def explained(figure: Figure, marks: Sequence[Any], meanings: Sequence[str]) -> None:
    """A legend above all panels, for what marks mean in all of them: below, it would cover the figure's own label."""
    columns = min(4, len(marks))
    figure.legend(marks, meanings, loc="outside upper center", ncols=columns, frameon=False, fontsize="small")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, two in a row."""
    columns = min(2, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.6 * columns, 3.7 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, panel in enumerate(axes):
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_visible(place < count)
    return figure, axes[:count]
