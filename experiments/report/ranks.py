"""Figures of what EVA found: ranks, spectra, convergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eva_lightning import plots
from eva_lightning.state import EVAState
from eva_lightning.streaming_options import StreamingOptions
from experiments.report.page import Figure, drawn

#: The callback's own threshold, which the comparisons leave as it is.
TAU = StreamingOptions().tau


def described(state: EVAState) -> dict[str, Any]:
    """The part of a state that figures draw, as plain JSON types."""
    return {
        "ranks": dict(state.ranks),
        "explained_variance_ratio": {name: ratio.tolist() for name, ratio in state.explained_variance_ratio.items()},
        "convergence": {name: [[int(t), float(q)] for t, q in curve] for name, curve in state.convergence.items()},
        "n_batches": int(state.n_batches),
        "seconds": float(state.seconds),
    }


def rank_figure(runs: Sequence[Mapping[str, float]], uniform: float, title: str) -> Figure:
    """Mean ranks over runs as a heat map.

    Args:
        runs: Rank per layer, of every run.
        uniform: The rank without redistribution.
        title: What stands above it.
    """
    names = dict.fromkeys(name for ranks in runs for name in ranks)
    mean = {name: float(np.mean([ranks.get(name, 0) for ranks in runs])) for name in names}
    highest, lowest = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
    return drawn(
        plots.rank_heatmap(mean, uniform, title),
        f"{title}: most in {highest} ({mean[highest]:.3g}) and least in {lowest} ({mean[lowest]:.3g}), "
        f"where {uniform:g} would be uniform",
        f"Without redistribution every layer has rank {uniform:g}. Red: more, blue: fewer.",
    )


def decomposition_figures(runs: Sequence[Mapping[str, Any]], uniform: int, prefix: str) -> list[Figure]:
    """Ranks, spectra and convergence.

    Args:
        runs: As by :func:`described`, of every run.
        uniform: The rank without redistribution.
        prefix: What the names of layers have in common.
    """
    first = runs[0]
    short = {name.removeprefix(prefix): rank for name, rank in first["ranks"].items()}
    variances = {name: sum(ratio) for name, ratio in first["explained_variance_ratio"].items()}
    figures = [
        rank_figure([run["ranks"] for run in runs], uniform, "Ranks of EVA, mean over seeds"),
        drawn(
            plots.rank_bars(short, uniform, "Ranks of EVA, first seed"),
            f"Rank of every layer of the first seed: from {min(short.values())} to {max(short.values())}, "
            f"{sum(rank > uniform for rank in short.values())} of {len(short)} above {uniform}",
            "Names: block, then layer. The sum is the same budget that LoRA has.",
        ),
        drawn(
            plots.spectra(first["explained_variance_ratio"], "Spectra of the layer inputs, first seed"),
            f"Explained-variance ratios: the components of a layer hold {min(variances.values()):.0%} to "
            f"{max(variances.values()):.0%} of the variance of its inputs",
            "One line per layer. The ranks keep the largest shares over all layers.",
        ),
    ]
    if last := [curve[-1][1] for curve in first["convergence"].values() if curve]:
        reached = f"{sum(value >= TAU for value in last)} of {len(last)} layers reach {TAU:g} in the last evaluation"
        used = f"The decomposition used {first['n_batches']} minibatches and took {first['seconds']:.2f} s"
        figures.append(
            drawn(
                plots.convergence(first["convergence"], TAU, "Convergence of the streaming SVD, first seed"),
                f"Captured variance per layer: {reached}",
                f"{used}; {reached}.",
            )
        )
    return figures
