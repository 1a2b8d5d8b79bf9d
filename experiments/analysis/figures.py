"""The figures and the printed lines of an analysis, from its numbers alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from eva_lightning import plots
from eva_lightning.analysis import rank_deltas
from experiments.analysis.settings import BATCH_SIZES, Settings

Numbers = Mapping[str, Any]
Figures = dict[str, Figure]


def convergence(settings: Settings, numbers: Numbers) -> Figures:
    """Figure 11."""
    figures = {}
    total = next(iter(numbers["curves"].values()))[0]["total"]
    for name, attribute, xlabel in (
        ("fig11_convergence_minibatches", "n_batches", "minibatches"),
        ("fig11_convergence_images", "n_samples", _samples(settings)),
        ("fig11_convergence_seconds", "seconds", "seconds, forward passes included"),
    ):
        points = {
            size: [(point[attribute], point["converged"]) for point in curve]
            for size, curve in numbers["curves"].items()
        }
        title = "Components that kept their direction (|cos| ≥ 0.99) in the last update"
        figures[name] = plots.convergence_counts(points, total, xlabel, title=title)
    return figures


def batch_sizes(settings: Settings, numbers: Numbers) -> Figures:
    """Figure 5, right."""
    title = "Components by batch size"
    return {"fig5_batch_sizes": plots.similarity_matrix(np.array(numbers["matrix"]), BATCH_SIZES, title=title)}


def batch_orders(settings: Settings, numbers: Numbers) -> Figures:
    """Figure 12, left."""
    curves = {
        "|cos| of the j-th components": numbers["cosine"],
        "overlap of the spans of the first j": numbers["overlap"],
    }
    title = f"{settings.orders} random orders, batch size 4, half of the {_samples(settings)} each"
    ylabel = "mean over layers and pairs of orders"
    return {"fig12_batch_orders": plots.component_similarity(curves, ylabel=ylabel, title=title)}


def ranks(settings: Settings, numbers: Numbers) -> Figures:
    """Figures 13 and 14, by layer, where the layers of a type stand together, and by type."""
    maps = {float(rho): _by_type(found) for rho, found in numbers["ranks"].items()}
    deltas = rank_deltas(maps)
    r = settings.map_rank
    title, changes = f"Ranks by ρ, r = {r}", "Changes from the next smaller ρ"
    of_kinds = shares(maps)
    curves = {kind: np.array([list(of_kinds[kind].values())]) for kind in of_kinds}
    return {
        "fig13_shares": plots.learning_curves(
            curves, "share of all ranks", "ρ", f"Ranks by type of layer, r = {r}", percent=True, x=list(maps)
        ),
        "fig13_ranks": plots.rank_maps(maps, r, title=title),
        "fig13_ranks_by_type": plots.ranks_by_kind(maps, r, title=f"{title}, mean over blocks"),
        "fig14_rank_changes": plots.rank_maps(deltas, 0, "change of rank", title=changes),
        "fig14_rank_changes_by_type": plots.ranks_by_kind(
            deltas, 0, "mean change of rank", title=f"{changes}, mean over blocks"
        ),
    }


def shares(maps: Mapping[float, Mapping[str, int]], parts: int | None = None) -> dict[str, dict[float, float]]:
    """Type of layer -> ρ -> its share of all ranks.

    Args:
        maps: ρ -> rank of every layer.
        parts: Share of parts of the depth instead: the blocks in so many groups of consecutive ones.
    """
    found: dict[str, dict[float, float]] = {}
    for rho, ranks in maps.items():
        blocks = sorted({block for name in ranks if (block := plots.split_layer_name(name)[0]) is not None})
        groups = {} if parts is None else {b: str(g) for b, g in _groups(blocks, parts).items()}
        for name, rank in ranks.items():
            block, kind = plots.split_layer_name(name)
            key = kind if parts is None else groups.get(block, "other layers")
            of_key = found.setdefault(key, {})
            of_key[rho] = of_key.get(rho, 0.0) + rank / max(sum(ranks.values()), 1)
    return found


def _groups(blocks: Sequence[int], parts: int) -> dict[int | None, str]:
    """Block -> the group of consecutive blocks that it is in: ``blocks 0 to 3``."""
    names: dict[int | None, str] = {}
    for chunk in np.array_split(np.array(blocks, dtype=int), min(parts, max(len(blocks), 1))):
        names |= dict.fromkeys(map(int, chunk), f"blocks {chunk[0]} to {chunk[-1]}" if len(chunk) else "")
    return names


def _by_type(ranks: Mapping[str, int]) -> dict[str, int]:
    kinds = list(dict.fromkeys(plots.split_layer_name(name)[1] for name in ranks))
    return dict(sorted(ranks.items(), key=lambda entry: kinds.index(plots.split_layer_name(entry[0])[1])))


def distances(settings: Settings, numbers: Numbers) -> Figures:
    """Tables 5 and 6, and Figure 12, right."""
    table5, table6 = numbers["table5"], numbers["table6"]
    title = f"A matrices, learning rate {settings.rate:g}, mean of {settings.seeds} seeds"
    figures = {}
    for name, key, label in (
        ("table6_spectral_norm", "spectral_norm", "spectral norm of the difference"),
        ("table6_cosine", "cosine", "mean cosine of rows"),
    ):
        bars = {f"{method}, start to end": {kind: v[key] for kind, v in row.items()} for method, row in table6.items()}
        bars["LoRA to EVA, both at the end"] = {kind: v[key] for kind, v in table5.items()}
        figures[name] = plots.grouped_bars(bars, label, title=title)
    return figures


DRAW = {
    "convergence": convergence,
    "batch-sizes": batch_sizes,
    "batch-orders": batch_orders,
    "ranks": ranks,
    "distances": distances,
}


def by_kind(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over seeds and blocks, per kind of layer."""
    frame = pd.DataFrame(
        {"kind": plots.split_layer_name(name)[1], **distance} for run in runs for name, distance in run.items()
    )
    means: dict[str, dict[str, float]] = frame.groupby("kind", sort=False).mean().to_dict("index")
    return means


def report(settings: Settings, numbers: Numbers) -> Iterable[str]:
    """What the numbers say, a line each."""
    if "convergence" in numbers:
        yield from _say_convergence(settings, numbers["convergence"]["curves"])
    if "batch-orders" in numbers:
        orders = numbers["batch-orders"]
        yield (
            f"batch orders: mean |cos| {orders['cosine'][0]:.3f} for the first component, "
            f"{statistics.mean(orders['cosine']):.3f} over all; the spans overlap by {orders['overlap'][-1]:.3f}"
        )
    if "batch-sizes" in numbers:
        smallest = min(value for row in numbers["batch-sizes"]["matrix"] for value in row)
        yield f"batch sizes: smallest mean |cos| {smallest:.3f}"
    if "ranks" in numbers:
        deltas = rank_deltas({float(rho): ranks for rho, ranks in numbers["ranks"]["ranks"].items()})
        moved = {f"{rho:g}": sum(abs(change) for change in delta.values()) for rho, delta in deltas.items()}
        yield f"ranks moved, by rho: {', '.join(f'{rho}: {n}' for rho, n in moved.items())}"
        yield from _say_shares(numbers["ranks"]["ranks"])
    if "distances" in numbers:
        yield from _say_distances(numbers["distances"])


def _say_convergence(settings: Settings, curves: Mapping[str, Sequence[Numbers]]) -> Iterable[str]:
    what = _samples(settings)
    for size, curve in curves.items():
        last = curve[-1]
        half = next((p for p in curve if p["converged"] >= last["total"] / 2), None)
        when = "never" if half is None else f"after {half['n_batches']} minibatches ({half['n_samples']} {what})"
        yield (
            f"batch size {size}: half of the {last['total']} components converged {when}, "
            f"{last['converged']} at the end of {last['n_samples']} {what}"
        )


def _say_shares(found: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    """Shares at some ρ, by type of layer and by thirds of the depth; then which layers have most and fewest ranks."""
    maps = {float(rho): ranks for rho, ranks in found.items()}
    shown = [rho for rho in (1.0, 1.5, 2.0, 3.0) if rho in maps]
    yield f"share of all ranks in percent, at rho {', '.join(f'{rho:g}' for rho in shown)}:"
    for key, of in {**shares(maps), **shares(maps, parts=3)}.items():
        yield f"  {key:<16}" + "".join(f"{100 * of[rho]:7.1f}" for rho in shown)
    ranks = maps[shown[-2] if len(shown) > 1 else shown[-1]]
    order = sorted(ranks, key=lambda name: -ranks[name])
    ends = [", ".join(f"{name} {ranks[name]}" for name in part) for part in (order[:3], order[-3:])]
    yield f"at rho {shown[-2] if len(shown) > 1 else shown[-1]:g} most ranks: {ends[0]}; fewest: {ends[1]}"


def _say_distances(numbers: Numbers) -> Iterable[str]:
    rows = {f"{method}: initial against final A": kinds for method, kinds in numbers["table6"].items()}
    rows["final A of LoRA against EVA's"] = numbers["table5"]
    for text, kinds in rows.items():
        norm = statistics.mean(v["spectral_norm"] for v in kinds.values())
        cosine = statistics.mean(v["cosine"] for v in kinds.values())
        yield f"{text}: spectral norm {norm:.2f}, cosine {cosine:.2f}"
    yield "(rows of A start at length 1 with EVA and about 0.58 with LoRA, which alone favours EVA's cosine)"
    yield from numbers.get("diverged", ())


def _samples(settings: Settings) -> str:
    return "windows" if settings.source == "robots" else "images"
