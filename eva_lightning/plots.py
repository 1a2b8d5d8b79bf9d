"""Figures of EVA runs: ranks, spectra, convergence of the streaming SVD, learning curves.

Every function returns a :class:`matplotlib.figure.Figure` of its own. pyplot is not used, so no global state or backend
of the caller changes, and the functions work without a display. Save with ``figure.savefig(path)``, or :func:`save`.
``title`` is the text above a figure. All functions raise :class:`~eva_lightning.errors.InputError` where there is
nothing to draw.

Axes are labelled in one notation: what is shown, in small letters and the singular where it counts, with its unit in
parentheses (``epoch``, ``accuracy (%)``, ``cross-entropy (nats)``); the numbers at the axes have no units. Lines, bars
and colours are explained in a legend, or by a labelled colour bar.
"""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from scipy import stats

from eva_lightning.errors import InputError
from eva_lightning.files import replacing

PALETTE = ("#5b6770", "#d1603d", "#2f7fc1", "#2a9d6f", "#8e63b0", "#c9a227")
#: Of more lines than this the legend stands below, where it hides none of them.
_FEW_LINES = 3
#: Inches of the widest figure: maps of large models.
_WIDEST = 24.0
_DARK, _GRID = "#20262b", "#e3e6e8"
_DASHED: dict[str, Any] = {"color": _DARK, "linestyle": "--", "linewidth": 1}


def save(figure: Figure, file: str | os.PathLike[str], dpi: int = 120) -> None:
    """Write a figure as PNG, all or nothing."""
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _axes(width: float = 5.0, height: float = 3.4, grid: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    # notebooks show figures of pyplot only; a class of our own would be no figure to wandb
    setattr(figure, "_repr_png_", partial(_png, figure))  # noqa: B010 - the type has no such attribute
    axes = figure.add_subplot()
    if grid:
        axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Axes, xlabel: str, ylabel: str, title: str | None) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, fontsize="medium", loc="left", parse_math=False)  # a folder's name may have a $
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes, **style: Any) -> None:
    axes.legend(frameon=False, fontsize="small", **style)


def _legend_outside(axes: Axes, title: str) -> None:
    _legend(axes, title=title, loc="upper left", bbox_to_anchor=(1.0, 1.0), title_fontsize="small")


def _legend_below(figure: Figure, columns: int = 2) -> None:
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _logarithmic(axes: Axes) -> None:
    """A logarithmic vertical axis with several numbers at it, however small its range."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axes.yaxis.set_major_locator(MaxNLocator(5) if high < 10 * low else LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())


def _line(axes: Axes, x: Any, y: Any, label: str, color: str) -> None:
    axes.plot(x, y, marker="o", markersize=3.5, linewidth=1.6, color=color, label=label)


def _lines_by_kind(axes: Axes, curves: Mapping[str, tuple[Any, Any]]) -> None:
    """One thin line per layer, coloured and labelled by the kind of layer: alike in all figures of a model."""
    kind_of = {name: split_layer_name(name)[1] for name in curves}
    kinds = sorted(set(kind_of.values()))
    labelled: set[str] = set()
    for name in sorted(curves, key=kind_of.__getitem__):
        (x, y), kind = curves[name], kind_of[name]
        axes.plot(
            x,
            y,
            marker="o",
            markersize=3,
            linewidth=1,
            alpha=0.75,
            color=PALETTE[kinds.index(kind) % len(PALETTE)],
            label=None if kind in labelled else kind,
        )
        labelled.add(kind)


def _colour_table(
    figure: Figure,
    values: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    label: str,
    write: str | None = "{:g}",
    center: float | None = None,
    reach: float = 1.0,
) -> None:
    """A table of colours with its numbers, written as `write` says; NaN stays empty.

    Colours diverge from `center`, up to `reach` away from it; without a center they go from 0 to 1.
    """
    axes = figure.axes[0]
    scale: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": 1}
    if center is not None:
        scale = {"cmap": "RdBu_r", "norm": CenteredNorm(center, reach)}
    image = axes.imshow(values, aspect="auto", **scale)
    for (row, column), value in np.ndenumerate(values):
        if write is not None and not math.isnan(value):
            light = value < 0.6 if center is None else abs(value - center) > 0.65 * reach
            color = "white" if light else _DARK
            axes.text(column, row, write.format(value), ha="center", va="center", color=color, fontsize="small")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)


def split_layer_name(name: str) -> tuple[int | None, str]:
    """Split a layer name at its last number: ``"model.blocks.3.mlp.fc1"`` becomes ``(3, "mlp.fc1")``.

    A name with no number before its last part gives ``(None, name)``: such a layer belongs to no block.
    """
    parts = name.split(".")
    for i in range(len(parts) - 2, -1, -1):
        if parts[i].isdigit():
            return int(parts[i]), ".".join(parts[i + 1 :])
    return None, name


def _places(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """The block and the kind of every layer; kinds that several networks share are told apart by what is before."""
    split = {name: split_layer_name(name) for name in names}
    shared = {kind for (_, kind), count in Counter(split.values()).items() if count > 1}
    return {
        name: (block, name.removesuffix(f"{block}.{kind}") + f"*.{kind}" if kind in shared else kind)
        for name, (block, kind) in split.items()
    }


def _require(values: Mapping[Any, Any], what: str) -> None:
    if not values:
        raise InputError(f"{what} must hold at least one entry, got none")


def rank_heatmap(ranks: Mapping[str, float], uniform_rank: float | None = None, title: str | None = None) -> Figure:
    """Ranks as a table of colours, one column per block and one row per kind of layer (and network, where several have
    the same blocks and kinds).

    Args:
        ranks: layer name to rank; means over runs are welcome.
        uniform_rank: rank without redistribution; it becomes the neutral colour. Default: the mean of ``ranks``.
    """
    _require(ranks, "ranks")
    places = _places(ranks)
    blocks = sorted({block for block, _ in places.values() if block is not None})
    columns: list[int | None] = [*blocks, *([None] if any(block is None for block, _ in places.values()) else [])]
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = np.full((len(kinds), len(columns)), np.nan)
    for name, (block, kind) in places.items():
        grid[kinds.index(kind), columns.index(block)] = ranks[name]

    figure, axes = _axes(1.6 + max(4.4, 0.62 * len(columns)), 1.3 + 0.55 * len(kinds), grid=False)
    center = float(np.nanmean(grid)) if uniform_rank is None else float(uniform_rank)
    reach = max(float(np.nanmax(np.abs(grid - center))), 2.0)
    names = ["other" if block is None else str(block) for block in columns]
    _label(axes, "block", "", title)
    _colour_table(figure, grid, names, kinds, "rank", "{:.3g}", center, reach)
    return figure


def rank_bars(ranks: Mapping[str, float], uniform_rank: float | None = None, title: str | None = None) -> Figure:
    """One horizontal bar per layer, in the order given; a dashed line marks the rank without redistribution."""
    _require(ranks, "ranks")
    figure, axes = _axes(height=1.0 + 0.2 * len(ranks), grid=False)
    names = list(ranks)
    axes.barh(range(len(names)), [ranks[name] for name in names], color=PALETTE[2], label="rank of the layer")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if uniform_rank is not None:
        axes.axvline(uniform_rank, label=f"without redistribution: {uniform_rank:g}", **_DASHED)
    _legend_below(figure)
    _label(axes, "rank", "", title)
    return figure


def spectra(ratios: Mapping[str, Sequence[float]], title: str | None = None) -> Figure:
    """Explained-variance ratio of every kept component, one line per layer, coloured by kind of layer.

    Args:
        ratios: layer name to its explained-variance ratios (share of the variance of that layer's inputs), descending.
    """
    _require(ratios, "ratios")
    figure, axes = _axes()
    curves = {}
    for name, values in ratios.items():
        shares = np.asarray(values, dtype=float)
        # a logarithmic axis has no place for zeros
        curves[name] = (np.arange(1, len(shares) + 1), np.where(shares > 0, shares, np.nan))
    _lines_by_kind(axes, curves)
    if any(np.any(y > 0) for _, y in curves.values()):
        _logarithmic(axes)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_outside(axes, "inputs of")
    _label(axes, "component", "share of the inputs' variance (%)", title)
    return figure


def convergence(
    curves: Mapping[str, Sequence[tuple[int, float]]], tau: float | None = None, title: str | None = None
) -> Figure:
    """How much of the best possible variance the previous components still capture, per layer, as minibatches come in.

    Args:
        curves: layer name to points ``(minibatches, value)``; 1 means that nothing was left to gain.
        tau: the threshold of the stopping rule, drawn as a dashed line.
    """
    _require(curves, "curves")
    figure, axes = _axes()
    seen = {name: tuple(zip(*points, strict=True)) for name, points in curves.items() if points}
    _lines_by_kind(axes, {name: (t, values) for name, (t, values) in seen.items()})
    if tau is not None:
        axes.axhline(tau, label=f"τ = {tau:g}", **_DASHED)
    ticks = {t for points in curves.values() for t, _ in points}
    if 0 < len(ticks) <= 10:
        axes.set_xticks(sorted(ticks))
    axes.ticklabel_format(axis="y", useOffset=False)
    if seen or tau is not None:
        _legend_outside(axes, "inputs of")
    _label(axes, "minibatches", "captured variance (share of the optimum)", title)
    return figure


def learning_curves(
    curves: Mapping[str, np.ndarray],
    ylabel: str,
    xlabel: str = "epoch",
    title: str | None = None,
    percent: bool = False,
    order: Sequence[str] = (),
    x: Sequence[float] | None = None,
) -> Figure:
    """Mean over runs with its 95% confidence interval (Student's t) as a band, one line per method.

    Args:
        curves: method to values of shape ``(runs, epochs)``; the first column is epoch 1.
        ylabel, xlabel: what the axes show, with units.
        percent: values are shares, shown as percentages; the unit is added to ``ylabel``.
        order: methods in the order that gives them their colours, so that figures with other methods agree.
        x: where the columns stand on the horizontal axis, if not at 1, 2, 3, ...

    Raises:
        InputError: ``curves`` is empty or a value is not of shape ``(runs, epochs)``.
    """
    _require(curves, "curves")
    crowded = len(curves) > _FEW_LINES
    figure, axes = _axes(height=3.4 + 0.2 * len(curves) * crowded)
    colours = list(dict.fromkeys([*order, *curves]))
    for label, values in curves.items():
        i = colours.index(label)
        values = np.asarray(values, dtype=float)
        if values.ndim != 2:
            raise InputError(f"curves[{label!r}] must have shape (runs, epochs), got {values.shape}")
        mean = values.mean(axis=0)
        places = np.arange(1, values.shape[1] + 1) if x is None else np.asarray(x)
        color = PALETTE[i % len(PALETTE)]
        _line(axes, places, mean, label, color)
        if len(values) > 1 and not np.isnan(mean).any():
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
            axes.fill_between(places, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
    if percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if crowded:
        _legend_below(figure, 2 if max(map(len, curves)) <= 24 else 1)
    else:
        _legend(axes)
    _label(axes, xlabel, f"{ylabel} (%)" if percent else ylabel, title)
    return figure


def rate_sensitivity(
    scores: Mapping[str, Mapping[float, float]],
    ylabel: str,
    xlabel: str = "learning rate",
    title: str | None = None,
    order: Sequence[str] = (),
) -> Figure:
    """A score against the learning rate, one line per method, both axes logarithmic; the lowest point is ringed.

    Args:
        scores: method to its score (lower is better, positive) at every learning rate.
        ylabel, xlabel: what the axes show, with units.
        order: methods in the order that gives them their colours, so that figures with other methods agree.
    """
    _require(scores, "scores")
    figure, axes = _axes()
    colours = list(dict.fromkeys([*order, *scores]))
    for label, row in scores.items():
        rates = sorted(row)
        color = PALETTE[colours.index(label) % len(PALETTE)]
        _line(axes, rates, [row[rate] for rate in rates], label, color)
        best = min(rates, key=row.__getitem__)
        axes.plot([best], [row[best]], marker="o", markersize=10, fillstyle="none", color=color)
    axes.set_xscale("log")
    _logarithmic(axes)
    ticks = sorted({rate for row in scores.values() for rate in row})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks], fontsize="small")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    _legend(axes)
    _label(axes, xlabel, ylabel, title)
    return figure


def image_grid(images: np.ndarray, captions: Sequence[str], columns: int = 10, title: str | None = None) -> Figure:
    """Grey images of shape ``(n, h, w)``, large values dark, each under its caption.

    Raises:
        InputError: there are no images, or not one caption per image.
    """
    images = np.asarray(images, dtype=float)
    if images.ndim != 3 or not len(images) or len(captions) != len(images):
        raise InputError(f"images must have shape (n, h, w) with one caption each, got {images.shape}, {len(captions)}")
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(0.72 * columns, 0.92 * rows + (0.3 if title else 0)), layout="constrained")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image, cmap="gray_r")
        axes.set_title(caption, fontsize="small", pad=2, parse_math=False)
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize="medium", parse_math=False)
    return figure


def convergence_counts(
    curves: Mapping[Any, Sequence[tuple[float, int]]],
    total: int,
    xlabel: str = "minibatches",
    legend: str = "batch size",
    title: str | None = None,
) -> Figure:
    """Number of converged components over time, minibatches or samples, one line per setting (paper Figure 11).

    Args:
        curves: setting (such as the batch size) to points ``(x, converged components)``.
        total: number of components, drawn as a dashed line.
        xlabel, legend: what x and the settings are.
    """
    _require(curves, "curves")
    figure, axes = _axes()
    for i, (label, points) in enumerate(curves.items()):
        x, converged = zip(*points, strict=True)
        axes.plot(x, converged, linewidth=1.6, color=PALETTE[i % len(PALETTE)], label=str(label))
    axes.axhline(total, label="all", **_DASHED)
    axes.set_ylim(bottom=0)
    _legend_outside(axes, legend)
    _label(axes, xlabel, "converged components", title)
    return figure


def component_similarity(
    curves: Mapping[str, Sequence[float]], ylabel: str = "similarity", title: str | None = None
) -> Figure:
    """Agreement of runs for every component, counted from 1, one line per measure (paper Figure 12, left)."""
    _require(curves, "curves")
    figure, axes = _axes()
    for i, (label, values) in enumerate(curves.items()):
        x = np.arange(1, len(values) + 1)
        _line(axes, x, values, label, PALETTE[i % len(PALETTE)])
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes, loc="lower left")
    _label(axes, "component", ylabel, title)
    return figure


def similarity_matrix(
    values: np.ndarray, labels: Sequence[Any], axis_label: str = "batch size", title: str | None = None
) -> Figure:
    """Similarities in [0, 1] between every two runs as a table of colours (paper Figure 5, right).

    Args:
        values: shape ``(n, n)``.
        labels: one per run.
        axis_label: what the labels are.

    Raises:
        InputError: ``values`` is not ``(n, n)`` for n labels.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(labels), len(labels)) or not len(labels):
        raise InputError(f"values must have shape (n, n) with one label each, got {values.shape}, {len(labels)} labels")
    figure, axes = _axes(1.9 + 0.75 * len(labels), 1.2 + 0.62 * len(labels), grid=False)
    names = [str(label) for label in labels]
    _label(axes, axis_label, axis_label, title)
    _colour_table(figure, values, names, names, "mean |cos|", "{:.2f}")
    return figure


def rank_maps(
    maps: Mapping[float, Mapping[str, float]], neutral: float, label: str = "rank", title: str | None = None
) -> Figure:
    """One row per rho and one column per layer (paper Figure 13), or the changes between them (Figure 14).

    Args:
        maps: rho to layer name to rank, or to change of rank.
        neutral: the value with the neutral colour: the uniform rank, or 0 for changes.
        label: what the colours show.
    """
    _require(maps, "maps")
    names = list(next(iter(maps.values())))
    grid = np.array([[ranks[name] for name in names] for ranks in maps.values()], dtype=float)
    reach = max(float(np.abs(grid - neutral).max()), 1.0)
    width, height = min(2.0 + max(4.0, 0.36 * len(names)), _WIDEST), 2.2 + 0.3 * len(maps)
    figure, axes = _axes(width, height, grid=False)
    short = [".".join(str(part) for part in split_layer_name(name) if part is not None) for name in names]
    write = "{:g}" if len(names) <= 64 else None
    _label(axes, "layer", "ρ", title)
    _colour_table(figure, grid, short, [f"{rho:g}" for rho in maps], label, write, neutral, reach)
    axes.tick_params(axis="x", rotation=90, labelsize="x-small" if len(names) <= 64 else 5)
    return figure


def ranks_by_kind(
    maps: Mapping[float, Mapping[str, float]], neutral: float, label: str = "mean rank", title: str | None = None
) -> Figure:
    """One row per kind of layer and one column per rho: means over the blocks of ranks, or of their changes.

    Args:
        maps, neutral, label: As in :func:`rank_maps`.
    """
    _require(maps, "maps")
    kinds = list(dict.fromkeys(split_layer_name(name)[1] for name in next(iter(maps.values()))))
    grid = np.array(
        [
            [
                np.mean([rank for name, rank in ranks.items() if split_layer_name(name)[1] == kind])
                for ranks in maps.values()
            ]
            for kind in kinds
        ]
    )
    reach = max(float(np.abs(grid - neutral).max()), 1.0)
    figure, axes = _axes(2.4 + max(4.0, 0.55 * len(maps)), 1.3 + 0.45 * len(kinds), grid=False)
    _label(axes, "ρ", "", title)
    _colour_table(figure, grid, [f"{rho:g}" for rho in maps], kinds, label, "{:.1f}", neutral, reach)
    return figure


def early_steps(
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    logarithmic: Sequence[str] = (),
    order: Sequence[str] = (),
    title: str | None = None,
) -> Figure:
    """Panels side by side over the first optimizer steps, one line per method: mean and standard deviation over runs
    (paper Figure 4).

    Args:
        panels: what the vertical axis shows to method to step to the values of its runs.
        logarithmic: panels with a logarithmic vertical axis; zeros are left out there.
        order: methods in the order that gives them their looks.
    """
    _require(panels, "panels")
    figure = Figure(figsize=(3.9 * len(panels) + 1.3, 3.4), layout="constrained")
    looks = list(dict.fromkeys([*order, *(label for panel in panels.values() for label in panel)]))
    for i, (ylabel, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
        for label, by_step in panel.items():
            steps = sorted(by_step)
            mean = np.array([np.mean(by_step[step]) for step in steps])
            deviation = np.array([np.std(by_step[step]) for step in steps])
            if ylabel in logarithmic:
                mean = np.where(mean > 0, mean, np.nan)
            place = looks.index(label)
            color = PALETTE[place % len(PALETTE)]
            # more methods than colours: lines of another kind
            style = ("-", "--", ":", "-.")[place // len(PALETTE) % 4]
            axes.plot(steps, mean, linewidth=1.5, linestyle=style, color=color, label=label)
            if deviation.any():
                low = (
                    np.where(mean > deviation, mean - deviation, np.nan) if ylabel in logarithmic else mean - deviation
                )
                axes.fill_between(steps, low, mean + deviation, color=color, alpha=0.15, linewidth=0)
        if ylabel in logarithmic:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axes, "step", ylabel, title if i == 0 else None)
    _legend_outside(figure.axes[-1], "")
    return figure


def horizontal_bars(
    values: Mapping[str, float], xlabel: str, texts: Mapping[str, str] | None = None, title: str | None = None
) -> Figure:
    """One bar per method, the first on top, each with its value, or its text, at the end.

    Args:
        values: method to value.
        xlabel: what values are.
        texts: method to what stands at the end of its bar.
    """
    _require(values, "values")
    figure, axes = _axes(7.0, 1.2 + 0.32 * len(values), grid=False)
    places = range(len(values))
    axes.barh(places, list(values.values()), 0.7, color=PALETTE[2])
    axes.set_yticks(places, list(values))
    axes.invert_yaxis()
    for place, (label, value) in zip(places, values.items(), strict=True):
        text = f"{value:.3g}" if texts is None else texts[label]
        axes.text(value, place, f" {text}", va="center", fontsize="small", color=_DARK)
    axes.set_xlim(right=1.45 * max(max(values.values()), 1e-9))
    _label(axes, xlabel, "", title)
    return figure


def grouped_bars(
    values: Mapping[str, Mapping[str, float]], ylabel: str, xlabel: str = "layers", title: str | None = None
) -> Figure:
    """Bars side by side per group, one colour per method, such as distances by kind of layer (paper Table 6).

    Args:
        values: method to group to value; groups a method lacks stay empty.
        ylabel, xlabel: what values and groups are.
    """
    _require(values, "values")
    groups = list(dict.fromkeys(group for row in values.values() for group in row))
    figure, axes = _axes(max(6.0, 1.1 * len(groups)), 3.6)
    width = 0.8 / len(values)
    for i, (label, row) in enumerate(values.items()):
        x = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        heights = [row.get(group, np.nan) for group in groups]
        axes.bar(x, heights, 0.92 * width, color=PALETTE[i % len(PALETTE)], label=label)
    axes.set_xticks(range(len(groups)), groups)
    axes.axhline(0, color=_DARK, linewidth=0.8)
    _legend_outside(axes, "")
    _label(axes, xlabel, ylabel, title)
    return figure
