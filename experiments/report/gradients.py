"""How large the gradients of A and B are over the first steps, as a figure (the EVA paper's Figure 4)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from eva_lightning import plots
from experiments.report.epochs import label, methods_of
from experiments.report.page import Figure, drawn

_PANELS = {"b": "gradient norm of B", "a": "gradient norm of A"}


def gradient_figure(runs: pd.DataFrame) -> Figure | None:
    """Norms over the first steps, one line per method; None where no run noted any.

    Args:
        runs: One row per run: ``method`` (key) and ``gradients``, the rows of
            :class:`eva_lightning.gradient_norms.GradientNorms`.
    """
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for column, title in _PANELS.items():
        lines = {label(method): _by_step(runs[runs["method"] == method], column) for method in methods_of(runs)}
        panels[title] = {name: line for name, line in lines.items() if line}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    figure = plots.early_steps(panels, tuple(panels), [label(method) for method in methods_of(runs)])
    said = "; ".join(f"{title}: {_in_words(lines)}" for title, lines in panels.items())
    steps = int(max(max(line) for lines in panels.values() for line in lines.values()))
    return drawn(
        figure,
        f"Norms of gradients over the first {steps} steps, means over steps and runs. {said}",
        "Line: mean over seeds; band: standard deviation. At the first step the gradient of A is 0 because B is.",
    )


def _by_step(runs: pd.DataFrame, column: str) -> dict[float, list[float]]:
    """Step -> values of the runs."""
    found: dict[float, list[float]] = {}
    for rows in runs["gradients"]:
        for row in rows if isinstance(rows, list) else ():
            if column in row:
                found.setdefault(float(row["step"]), []).append(float(row[column]))
    return found


def _in_words(lines: dict[str, dict[float, list[float]]]) -> str:
    means = {name: np.mean([value for values in line.values() for value in values]) for name, line in lines.items()}
    return ", ".join(f"{name} {mean:.2g}" for name, mean in means.items())
