"""How large the gradients of A and B are over the first steps, as a figure (the EVA paper's Figure 4)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from eva_lightning import plots
from experiments.report.epochs import COLOURED, in_order, label, methods_of
from experiments.report.page import Figure, drawn

_PANELS = {"b": "gradient norm of B", "a": "gradient norm of A"}
_CAPTIONS = {
    "b": "Line: mean over seeds; band: standard deviation.",
    "a": "At the first step it is 0, because B is.",
}


def gradient_figures(runs: pd.DataFrame) -> list[Figure]:
    """Norms over the first steps, of B and of A, one line per method; none where no run noted any.

    Args:
        runs: One row per run: ``method`` (key) and ``gradients``, the rows of
            :class:`eva_lightning.gradient_norms.GradientNorms`.
    """
    figures = []
    for column, title in _PANELS.items():
        lines = {label(method): _by_step(runs[runs["method"] == method], column) for method in methods_of(runs)}
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            steps = int(max(map(max, lines.values())))
            figures.append(
                drawn(
                    plots.early_steps({title: lines}, (title,), COLOURED),
                    f"The {title} over the first {steps} steps; its mean, the largest first: {_means(lines)}",
                    _CAPTIONS[column],
                )
            )
    return figures


def _by_step(runs: pd.DataFrame, column: str) -> dict[float, list[float]]:
    """Step -> values of the runs."""
    found: dict[float, list[float]] = {}
    for rows in runs["gradients"]:
        for row in rows if isinstance(rows, list) else ():
            if column in row:
                found.setdefault(float(row["step"]), []).append(float(row[column]))
    return found


def _means(lines: dict[str, dict[float, list[float]]]) -> str:
    means = {n: float(np.mean([value for values in line.values() for value in values])) for n, line in lines.items()}
    return in_order(means, ".2g", largest=True)
