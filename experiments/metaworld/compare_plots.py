"""Pictures of the comparison: validation losses against updates, and success by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.metaworld.compare_statistics import Run, loss_after, over_seeds, over_tasks, success

# by method, so that a method keeps its colour whatever else is compared
_STYLES: dict[str, dict[str, Any]] = {
    "scratch": {"color": "#9aa5ab", "linestyle": ":"},
    "fft": {"color": "#1c1c1c", "linestyle": "-"},
    "lora": {"color": "#d1603d", "linestyle": "-"},
    "dora": {"color": "#c9a227", "linestyle": "--"},
    "eva:1": {"color": "#7db4e0", "linestyle": "-"},
    "eva:2": {"color": "#1f5f9c", "linestyle": "-"},
    "eva-dora:2": {"color": "#2a9d6f", "linestyle": "--"},
}
_OTHER: dict[str, Any] = {"color": "#8e63b0", "linestyle": "-."}


def loss_figure(runs: Sequence[Run], tasks: Sequence[str], labels: Mapping[str, str], steps: Sequence[int]) -> Figure:
    """One panel per task: mean validation loss with its 95% interval, both axes logarithmic."""
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.4, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    after = [step for step in steps if step > 0]
    for panel, task in zip(panels.flat, tasks, strict=False):
        for place, (key, label) in enumerate(labels.items()):
            found = [over_seeds(runs, task, key, loss_after(step)) for step in after]
            line = [(step, each) for step, each in zip(after, found, strict=True) if each is not None]
            if not line:
                continue
            # next to each other, not on top of each other
            x = [step * 1.025 ** (place - len(labels) / 2) for step, _ in line]
            means = [each.mean for _, each in line]
            halves = [0.0 if each.half is None else min(each.half, 0.9 * each.mean) for _, each in line]
            style = _STYLES.get(key, _OTHER)
            panel.errorbar(x, means, yerr=halves, label=label, marker="o", markersize=3, linewidth=1.4,
                           elinewidth=0.9, capsize=1.5, **style)  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(after, [str(step) for step in after])
        panel.minorticks_off()
        low, high = panel.get_ylim()
        ticks = [t for t in (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5) if low <= t <= high]
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.set_title(task, fontsize="medium", loc="left")
        panel.set_xlabel("updates")
        panel.set_ylabel("validation loss")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(tasks) :]:
        panel.set_visible(False)
    lines, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def success_figure(runs: Sequence[Run], tasks: Sequence[str], labels: Mapping[str, str]) -> Figure:
    """Bars of mean success by method, one group per task and one for their mean; a dot per seed."""
    groups = [*tasks, *(["mean"] if len(tasks) > 1 else [])]
    figure = Figure(figsize=(1.6 + 2.1 * len(groups), 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.84 / len(labels)
    for place, (key, label) in enumerate(labels.items()):
        color = _STYLES.get(key, _OTHER)["color"]
        axes.bar([0], [0], color=color, label=label)
        for number, group in enumerate(groups):
            x = number + (place - (len(labels) - 1) / 2) * width
            alone = group != "mean"
            found = over_seeds(runs, group, key, success) if alone else over_tasks(runs, tasks, key, success)
            if found is None:
                continue
            axes.bar(x, found.mean, width=0.92 * width, color=color, zorder=2)
            if found.half is not None:
                low, high = min(found.half, found.mean), min(found.half, 1 - found.mean)
                axes.errorbar(x, found.mean, yerr=[[low], [high]], color="#1c1c1c", linewidth=0.9, capsize=2, zorder=4)
            if alone:
                dots = [success(run) for run in runs if run["task"] == group and run["variant"] == key]
                axes.plot([x] * len(dots), dots, "o", color="white", markeredgecolor="#1c1c1c", markeredgewidth=0.5,
                          markersize=2.8, zorder=3)  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.03)
    axes.set_ylabel("success (share of episodes)")
    axes.grid(axis="y", alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    return figure
