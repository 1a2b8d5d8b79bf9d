"""Methods compared epoch by epoch over the same seeds: means, paired differences and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from eva_lightning import plots
from eva_lightning.methods import METHODS, MethodKey
from experiments.report.page import Figure, Table, drawn, enumerated
from experiments.runner.statistics import PLUS_MINUS, Interval

EARLY = (1, 2, 3)


@dataclass(frozen=True)
class EpochComparison:
    """Tables, sentences and figures of one comparison; a table or sentence that needs pairs may be missing."""

    results: Table
    differences: Table | None
    verdicts: tuple[str, ...]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class PairedDifference:
    """A method minus a baseline on the seeds that both have, by epoch.

    Attributes:
        method, baseline: Their keys.
        seeds: How many pairs.
        loss: Of the held-out loss; negative where the method is better.
        accuracy: In percentage points.
        wins: Seeds on which the loss is lower.
    """

    method: str
    baseline: str
    seeds: int
    loss: Mapping[int, Interval]
    accuracy: Mapping[int, Interval]
    wins: Mapping[int, int]

    @property
    def sentence(self) -> str:
        """What the differences of the loss say."""
        epochs: dict[str, list[int]] = {}
        for epoch, difference in self.loss.items():
            epochs.setdefault(verdict(difference), []).append(epoch)
        parts = [f"{said} after epoch{'s' * (len(which) > 1)} {enumerated(which)}" for said, which in epochs.items()]
        return (
            f"{label(self.method)} against {label(self.baseline)}, held-out loss over {self.seeds} paired seeds: "
            f"{'; '.join(parts)}."
        )


def label(method: str) -> str:
    """How reports print the method of a key."""
    return MethodKey.parse(method).label


def methods_of(runs: pd.DataFrame) -> list[str]:
    """Keys of the methods in a table of runs, in the order of reports."""
    order = list(METHODS)
    keys = [MethodKey.parse(key) for key in runs["method"].unique()]
    return [key.key for key in sorted(keys, key=lambda key: (order.index(key.method), key.rho or 0.0))]


def curves(runs: pd.DataFrame, quantity: str) -> np.ndarray:
    """``"loss"`` or ``"accuracy"`` of every run, in the order of seeds, shape ``(runs, epochs)``."""
    return np.array(list(runs.sort_values("seed")[quantity]), dtype=float)


def shown_epochs(n_epochs: int) -> list[int]:
    """The epochs of the tables: 1, 2, 3 and the last."""
    return sorted({epoch for epoch in EARLY if epoch < n_epochs} | {n_epochs})


def verdict(difference: Interval) -> str:
    """A difference of losses in words: clear means that its 95% interval excludes 0."""
    if difference.half is None:
        return "undecided (one seed)"
    if not difference.excludes_zero:
        return "no clear difference"
    return "ahead" if difference.mean < 0 else "behind"


def compare(runs: pd.DataFrame, baseline: str = "lora") -> EpochComparison:
    """Compare the methods in `runs`, each with one learning rate.

    Args:
        runs: One row per run: ``method`` (key), ``seed``, ``lr``, ``loss`` and ``accuracy`` (lists with a value per
            epoch), ``trainable_parameters``, ``setup_seconds``.
        baseline: The method that EVA's are compared with, seed by seed.
    """
    differences = paired_differences(runs, baseline)
    return EpochComparison(
        results=results_table(runs),
        differences=differences_table(differences) if differences else None,
        verdicts=tuple(difference.sentence for difference in differences),
        figures=tuple(_curve_figure(runs, quantity) for quantity in ("loss", "accuracy")),
    )


def results_table(runs: pd.DataFrame) -> Table:
    """A row per method. Seconds are medians: the first run of a process is slower."""
    rows: dict[str, dict[str, str]] = {}
    losses = {method: _per_epoch(curves(runs[runs["method"] == method], "loss")) for method in methods_of(runs)}
    best = {epoch: min(row[epoch].mean for row in losses.values()) for epoch in next(iter(losses.values()))}
    for method, loss in losses.items():
        group = runs[runs["method"] == method]
        accuracy = _per_epoch(100 * curves(group, "accuracy"))
        rows[label(method)] = {
            "Rate": f"{group['lr'].iloc[0]:g}",
            "Trained": f"{group['trainable_parameters'].mean():,.0f}",
            "Set-up": f"{group['setup_seconds'].median():.2f} s",
        } | {
            f"Epoch {epoch}": f"{it.text(3)}{'*' * (it.mean == best[epoch])}\n{accuracy[epoch].text(1)} %"
            for epoch, it in loss.items()
        }
    notes = (
        PLUS_MINUS,
        "*: the lowest mean of the column, which says nothing about significance.",
        "Rate: learning rate. Trained: parameters, with head and biases.",
        "Set-up: median time from the pre-trained model to the first training step, with Lightning's own start.",
    )
    cells = pd.DataFrame.from_dict(rows, orient="index").rename_axis("Method")
    return Table("Held-out cross-entropy and, below it, accuracy", cells, notes)


def paired_differences(runs: pd.DataFrame, baseline: str = "lora") -> list[PairedDifference]:
    """Every EVA method minus `baseline`, over the seeds that both have."""
    theirs = runs[runs["method"] == baseline]
    found = []
    for method in methods_of(runs):
        ours = runs[(runs["method"] == method) & runs["seed"].isin(theirs["seed"])]
        if MethodKey.parse(method).state_kind is None or ours.empty:
            continue
        pairs = theirs[theirs["seed"].isin(ours["seed"])]
        loss, accuracy = (curves(ours, quantity) - curves(pairs, quantity) for quantity in ("loss", "accuracy"))
        wins = {epoch: int((loss[:, epoch - 1] < 0).sum()) for epoch in shown_epochs(loss.shape[1])}
        difference = PairedDifference(method, baseline, len(ours), _per_epoch(loss), _per_epoch(100 * accuracy), wins)
        found.append(difference)
    return found


def differences_table(differences: Sequence[PairedDifference]) -> Table:
    """A row per difference."""
    rows = {
        f"{label(it.method)} − {label(it.baseline)}": {
            f"Epoch {epoch}": f"{loss.text(3, sign=True)}\n{it.accuracy[epoch].text(1, sign=True)} points\n"
            f"lower on {it.wins[epoch]} of {it.seeds}"
            for epoch, loss in it.loss.items()
        }
        for it in differences
    }
    cells = pd.DataFrame.from_dict(rows, orient="index").rename_axis("Difference")
    notes = (PLUS_MINUS, "A difference is clear if its interval excludes 0; a negative loss means that EVA is better.")
    return Table("EVA minus LoRA on the same seeds: held-out loss, accuracy, seeds with a lower loss", cells, notes)


def _per_epoch(values: np.ndarray) -> dict[int, Interval]:
    return {epoch: Interval.of(values[:, epoch - 1].tolist()) for epoch in shown_epochs(values.shape[1])}


def _curve_figure(runs: pd.DataFrame, quantity: str) -> Figure:
    lines = {label(method): curves(runs[runs["method"] == method], quantity) for method in methods_of(runs)}
    last = ", ".join(f"{name} {values[:, -1].mean():.3g}" for name, values in lines.items())
    unit = {"loss": "cross-entropy (nats)", "accuracy": "accuracy"}[quantity]
    order = [label(method) for method in ("fft", "lora", "eva:1", "eva")]
    figure = plots.learning_curves(
        lines, unit, title=f"Held-out {quantity}", percent=quantity == "accuracy", order=order
    )
    return drawn(
        figure, f"Held-out {quantity} per epoch; after the last: {last}", "Line: mean over seeds; band: 95% interval."
    )
