"""Figures of folders that are not VTAB-1K's official draws: differences to the baseline, and losses by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator

from eva_lightning.plots import PALETTE
from experiments.runner.statistics import Interval
from experiments.vtab.own_curves import of_entries, ordered
from experiments.vtab.own_pairs import paired_cells
from experiments.vtab.own_results import MARK, OwnResults, full_label

#: Methods that the curves show first: what takes directions, scale and ranks of EVA apart.
_SHOWN = ("orthonormal", "eva-lora-norm", "eva:1", "eva", "eva-gradient")
_INK = "#1f5f9c"


def own_figures(results: OwnResults, histories: pd.DataFrame) -> dict[str, Figure]:
    """File name -> figure."""
    figures = {"own_differences.png": differences_figure(results)}
    if len(histories):
        figures["own_curves.png"] = curves_figure(results, histories)
    return {name: figure for name, figure in figures.items() if figure is not None}


def differences_figure(results: OwnResults) -> Figure | None:
    """A panel per folder and mean: each method minus the baseline; filled where the corrected p is below 0.05."""
    pairs = paired_cells(results)
    labels = [entry.label for entry in results.entries if any(label == entry.label for label, _ in pairs)]
    if not labels:
        return None
    columns = list(results.columns)
    rows = -(-len(columns) // 4)
    size = (2.0 + 2.3 * min(4, len(columns)), 0.8 + rows * (0.7 + 0.24 * len(labels)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, min(4, len(columns)), squeeze=False, sharey=True)
    for axes, column in zip(grid.flat, columns, strict=False):
        for place, label in enumerate(labels):
            cell = pairs.get((label, column))
            if cell is not None:
                face = _INK if cell.is_significant else "white"
                axes.errorbar(
                    cell.interval.mean, place, xerr=cell.interval.half, color=_INK, marker="o", markersize=4.5,
                    markerfacecolor=face, elinewidth=0.9, capsize=1.8,
                )  # fmt: skip
        axes.axvline(0, color="#20262b", linewidth=0.8)
        axes.set_title(column, fontsize="small", loc="left")
        axes.tick_params(axis="y", labelsize="small")
        _tidy(axes)
    for axes in grid.flat[len(columns) :]:
        axes.set_visible(False)
    grid.flat[0].set_yticks(range(len(labels)), labels)
    grid.flat[0].set_ylim(len(labels) - 0.5, -0.5)
    baseline = full_label(results.baseline)
    text = f"accuracy minus that of {baseline} (percent points)\n"
    marks = [Line2D([], [], color=_INK, marker="o", markerfacecolor=face) for face in (_INK, "white")]
    meanings = ("corrected p < 0.05", "no significant difference")
    where: dict[str, Any] = {"loc": "outside upper center", "ncols": 2, "frameon": False, "fontsize": "small"}
    figure.legend(marks, [f"{meaning}; bars: 95% interval" for meaning in meanings], **where)
    figure.supxlabel(text + f"{MARK} not VTAB-1K's official draw", fontsize="small")
    return figure


def curves_figure(results: OwnResults, histories: pd.DataFrame) -> Figure:
    """A row per folder: loss over epochs at each learning rate of the grid, and at the tuned ones."""
    tuning = histories[histories["phase"] == "tune"]
    final = of_entries(results, histories[histories["phase"] == "final"])
    methods = [m for m in ordered(histories["method"], results.baseline) if m in (results.baseline, *_SHOWN)]
    rates = sorted(tuning.loc[tuning["method"].isin(methods), "lr"].unique())
    size = (1.0 + 2.2 * (len(rates) + 1), 0.9 + 1.8 * len(results.folders))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(results.folders), len(rates) + 1, squeeze=False, sharex=True, sharey="row")
    for row, folder in zip(grid, results.folders, strict=True):
        for axes, rate in zip(row, rates, strict=False):
            _panel(axes, tuning[(tuning["task"] == folder) & (tuning["lr"] == rate)], methods)
            axes.set_title(f"lr {rate:g}", fontsize="small", loc="left")
        _panel(row[-1], final[final["task"] == folder], methods)
        row[-1].set_title("tuned (final runs)", fontsize="small", loc="left")
        row[0].set_ylabel(f"{folder}{MARK}", fontsize="small")
    lines = [grid[0][0].plot([], [], color=_colour(m, methods), label=full_label(m))[0] for m in methods]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize="small")
    held_out = "; dashed: of the validation images" if histories["val_loss"].notna().any() else ""
    figure.supxlabel(
        f"epoch (lines: training cross-entropy in nats, mean over seeds; bands: 95% interval{held_out})\n"
        f"{MARK} not VTAB-1K's official draw",
        fontsize="small",
    )
    return figure


class _BetweenDecades(LogFormatter):
    """Numbers between decades where few of these fit, written as those of decades are."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _colour(method: str, methods: Sequence[str]) -> str:
    return PALETTE[methods.index(method) % len(PALETTE)]


def _panel(axes: Axes, runs: pd.DataFrame, methods: Sequence[str]) -> None:
    for method in methods:
        of_method = runs[runs["method"] == method]
        _curve(axes, of_method, "train_loss", color=_colour(method, methods), marker="o", markersize=2.5)
        _curve(axes, of_method, "val_loss", color=_colour(method, methods), linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(_BetweenDecades(minor_thresholds=(1.2, 0.5)))
    axes.tick_params(axis="y", which="both", labelsize="x-small")
    _tidy(axes)


def _curve(axes: Axes, runs: pd.DataFrame, loss: str, color: str, **style: Any) -> None:
    """Means and intervals of logarithms, as the tables have them."""
    found = np.log(runs.set_index("epoch")[loss].dropna()).groupby("epoch")
    if not len(found):
        return
    epochs, intervals = zip(*((epoch, Interval.of(list(values))) for epoch, values in found), strict=True)
    axes.plot(epochs, np.exp([i.mean for i in intervals]), color=color, **style)
    if all(i.half is not None for i in intervals):
        low, high = np.exp([[i.low for i in intervals], [i.high for i in intervals]])
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)


def _tidy(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize="x-small")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
