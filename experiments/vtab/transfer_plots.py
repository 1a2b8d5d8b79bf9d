"""Pictures of the transfer experiment: test loss by epoch, and differences to LoRA with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.runner.statistics import Interval

#: Panels of the curves: title -> methods, beside LoRA.
GROUPS: dict[str, tuple[str, ...]] = {
    "what pre-training is worth": ("linear-random", "scratch", "linear", "fft"),
    "other adapters than LoRA's": ("dora", "rslora", "lora+", "adalora", "lora-redistribute"),
    "initialised from weights, gradients or covariances": ("pissa", "milora", "olora", "corda", "lora-ga"),
    "EVA and its ablations": (
        "eva:1", "eva", "eva-dora", "eva-whiten", "eva-rotate", "eva-permute", "eva-minor",
    ),
}  # fmt: skip

_COLOURS = ("#1f5f9c", "#2a9d6f", "#c9a227", "#8e63b0", "#7db4e0", "#1c1c1c", "#9aa5ab")
_REFERENCE: dict[str, Any] = {"color": "#d1603d", "linewidth": 2.2, "zorder": 5}


def curves_figure(runs: Sequence[Mapping[str, Any]], labels: Mapping[str, str], epochs: Sequence[int]) -> Figure:
    """Mean test loss by epoch with its 95% interval, LoRA in every panel."""
    known = {key for group in GROUPS.values() for key in group}
    groups = {**GROUPS, "others": tuple(key for key in labels if key not in known and key != "lora")}
    shown = {title: [key for key in keys if key in labels] for title, keys in groups.items()}
    shown = {title: keys for title, keys in shown.items() if keys} or {"": []}
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, (title, keys) in zip(panels.flat, shown.items(), strict=False):
        drawn = [*(["lora"] if "lora" in labels else []), *keys]
        for place, key in enumerate(drawn):
            found = [_interval(runs, key, epoch) for epoch in epochs]
            # next to each other, not on top of each other
            x = [epoch * 1.012 ** (place - len(drawn) / 2) for epoch in epochs]
            style = _REFERENCE if key == "lora" else {"color": _COLOURS[(place - 1) % len(_COLOURS)], "linewidth": 1.3}
            panel.errorbar(
                x,
                [each.mean for each in found],
                yerr=[each.half or 0.0 for each in found],
                label=labels[key],
                marker="o",
                markersize=3,
                elinewidth=0.9,
                capsize=1.5,
                **style,
            )
        panel.set_xscale("log")
        panel.set_xticks(epochs, [str(epoch) for epoch in epochs])
        panel.minorticks_off()
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.set_title(title, fontsize="medium", loc="left")
        panel.set_xlabel("epoch")
        panel.set_ylabel("test loss (nats)")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize="x-small", ncols=2 if len(drawn) > 6 else 1)
    for panel in list(panels.flat)[len(shown) :]:
        panel.set_visible(False)
    return figure


def differences_figure(columns: Mapping[str, Mapping[str, Interval | None]], labels: Mapping[str, str]) -> Figure:
    """One row per method, one panel per quantity: the difference to LoRA and its 95% interval.

    Intervals that exclude 0 are dark, blue where the method is better than LoRA and red where it is worse.

    Args:
        columns: Title -> method -> interval. Less is better where the title says loss.
        labels: Method -> name, in the order of rows.
    """
    figure = Figure(figsize=(1.6 + 1.75 * len(columns), 1.0 + 0.25 * len(labels)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)
    places = {key: -number for number, key in enumerate(labels)}
    for panel, (title, cells) in zip(panels.flat, columns.items(), strict=True):
        for key, interval in cells.items():
            if interval is None or key not in places:
                continue
            better = interval.mean < 0 if "loss" in title else interval.mean > 0
            colour = ("#1f5f9c" if better else "#c0392b") if interval.excludes_zero else "#9aa5ab"
            panel.errorbar(
                interval.mean, places[key], xerr=interval.half or 0.0, color=colour, marker="o", markersize=3.5,
                elinewidth=1.3, capsize=2,
            )  # fmt: skip
        panel.axvline(0.0, color="#d1603d", linewidth=1.0, zorder=0)
        panel.set_title(title.replace(", ", ",\n"), fontsize="small")
        panel.tick_params(labelsize="x-small")
        panel.grid(axis="x", alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.margins(y=0.03)
    panels.flat[0].set_yticks(list(places.values()), list(labels.values()), fontsize="small")
    figure.supxlabel("minus LoRA, mean and 95% interval over seeds", fontsize="small")
    return figure


def _interval(runs: Sequence[Mapping[str, Any]], key: str, epoch: int) -> Interval:
    values = [
        float(row["loss"]) for run in runs if run["variant"] == key for row in run["looks"] if row["epoch"] == epoch
    ]
    return Interval.of(values)
