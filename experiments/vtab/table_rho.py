"""Accuracy over ρ (the paper's Figure 15), from the runs of a sweep over several ρ."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from eva_lightning.methods.registry import METHODS
from eva_lightning.plots import PALETTE
from experiments.runner.jobs import Point
from experiments.runner.statistics import Interval, Sample, mean_over
from experiments.runner.tuning import choose

_SPLITS = {"tune": "val200, tuning runs", "final": "test, final runs"}


@dataclass(frozen=True)
class RhoCurve:
    """Accuracy of a method over ρ, each ρ at its own best learning rate and rank on val200.

    Attributes:
        label: The method and what it is the accuracy on.
        phase: ``"tune"`` (val200) or ``"final"`` (test).
        values: ρ -> mean accuracy in percent over `tasks`, with its 95% interval over seeds.
        tasks: Those with all ρ.
    """

    label: str
    phase: str
    values: dict[float, Interval]
    tasks: tuple[str, ...]


def rho_curves(runs: pd.DataFrame) -> list[RhoCurve]:
    """The curves of all methods that were tuned over at least two ρ; of final runs, where all ρ of a task have them."""
    curves = []
    with_rho = runs[runs["rho"].notna()]
    experiments = with_rho["experiment"].nunique()
    for (experiment, family), found in with_rho.groupby(["experiment", "family"], sort=False):
        label = METHODS[family].label + (f" #{experiment[:6]}" if experiments > 1 else "")
        best = _best_points(found[found["phase"] == "tune"])
        for phase, split in _SPLITS.items():
            samples = _samples(found[found["phase"] == phase], best)
            rhos = sorted({rho for of_task in samples.values() for rho in of_task})
            tasks = tuple(task for task, of_task in samples.items() if sorted(of_task) == rhos)
            if len(rhos) > 1 and tasks:
                values = {rho: mean_over([samples[task][rho] for task in tasks]) for rho in rhos}
                curves.append(RhoCurve(f"{label}: {split} ({len(tasks)} tasks)", phase, values, tasks))
    return curves


def _best_points(trials: pd.DataFrame) -> dict[tuple[str, float], Point]:
    """Task and ρ -> the learning rate and rank of the best tuning."""
    best = {}
    for (task, rho), found in trials.groupby(["task", "rho"]):
        scores = {point: same["score"].tolist() for point, same in found.groupby("point", sort=False)}
        choice = choose(scores, max(map(len, scores.values())))
        if choice is not None:
            best[str(task), float(rho)] = choice.point
    return best


def _samples(runs: pd.DataFrame, best: dict[tuple[str, float], Point]) -> dict[str, dict[float, Sample]]:
    found: dict[str, dict[float, Sample]] = {}
    for (task, rho), same in runs.groupby(["task", "rho"]):
        counted = same[[point == best.get((str(task), float(rho))) for point in same["point"]]].drop_duplicates("seed")
        if len(counted):
            found.setdefault(str(task), {})[float(rho)] = Sample.of(counted["accuracy"].tolist())
    return found


def rho_figures(runs: pd.DataFrame) -> dict[str, Figure]:
    """``rho.png`` where there is a curve."""
    curves = rho_curves(runs)
    if not curves:
        return {}
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        means = [interval.mean for interval in curve.values.values()]
        halves = [interval.half or 0.0 for interval in curve.values.values()]
        style = "-" if curve.phase == "final" else "--"
        colour = PALETTE[index % len(PALETTE)]
        axes.errorbar(list(curve.values), means, yerr=halves, label=curve.label, color=colour, linestyle=style,
                      marker="o", markersize=4, capsize=2)  # fmt: skip
    axes.set_xlabel("ρ (largest rank over mean rank)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title("each ρ at its best learning rate and rank on val200", fontsize="medium", loc="left")
    axes.legend(frameon=False, fontsize="small", title="bars: 95% interval over seeds", title_fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return {"rho.png": figure}
