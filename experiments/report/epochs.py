"""Methods compared epoch by epoch over the same seeds: means, paired differences and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from eva_lightning import plots
from eva_lightning.methods import METHODS, MethodKey
from experiments.report.page import Figure, Table, drawn, enumerated
from experiments.runner.statistics import PLUS_MINUS, Interval
from experiments.runner.tables import NOTHING

EARLY = (1, 2, 3)

#: What methods are compared by first of all, and their learning rates are chosen by: one measure for both.
CRITERION = "loss after the last epoch"

Pairs = Sequence[tuple[str, str]]
"""Keys of methods: one, and the one it is compared with."""


@dataclass(frozen=True)
class EpochComparison:
    """Tables, sentences and figures of one comparison; a table or sentence that needs pairs may be missing.

    The headline says what :data:`CRITERION` is for every method, the best first.
    """

    results: Table
    differences: Table | None
    verdicts: tuple[str, ...]
    figures: tuple[Figure, ...]
    headline: str


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
    """``"loss"`` or ``"accuracy"`` of every run, in the order of seeds, shape ``(runs, evaluations)``."""
    return np.array(list(runs.sort_values("seed")[quantity]), dtype=float)


#: Labels of methods in the order that gives them their colours, the same in all figures of a page.
COLOURED = tuple(label(method) for method in ("fft", "lora", "eva:1", "eva"))


def evaluated(runs: pd.DataFrame) -> list[int]:
    """The epochs after which all these runs were evaluated: their column ``epochs``, else all of them."""
    if "epochs" in runs:
        return [int(epoch) for epoch in runs["epochs"].iloc[0]]
    return list(range(1, 1 + len(runs["loss"].iloc[0])))


def shown_epochs(evaluations: Sequence[int]) -> list[int]:
    """The epochs of the tables: 1, 2, 3, as far as there were evaluations after them, and the last."""
    return [epoch for epoch in evaluations if epoch in EARLY or epoch == evaluations[-1]]


def verdict(difference: Interval) -> str:
    """A difference of losses in words: clear means that its 95% interval excludes 0."""
    if not math.isfinite(difference.mean):
        return "undecided (a run diverged)"
    if difference.half is None:
        return "undecided (one seed)"
    if not difference.excludes_zero:
        return "no clear difference"
    return "ahead" if difference.mean < 0 else "behind"


def compare(runs: pd.DataFrame, pairs: Pairs | None = None) -> EpochComparison:
    """Compare the methods in `runs`, each with one learning rate.

    Args:
        runs: One row per run: ``method`` (key), ``seed``, ``lr``, ``loss`` and ``accuracy`` (lists with a value per
            evaluation), ``epochs`` (those they were after; all of them where the column is missing),
            ``trainable_parameters``, ``setup_seconds``.
        pairs: A method and the one it is compared with, seed by seed; every EVA with LoRA for None.
    """
    differences = paired_differences(runs, pairs)
    return EpochComparison(
        results=results_table(runs),
        differences=differences_table(differences) if differences else None,
        verdicts=tuple(difference.sentence for difference in differences),
        figures=tuple(_curve_figure(runs, quantity) for quantity in ("loss", "accuracy")),
        headline=headline(runs),
    )


def headline(runs: pd.DataFrame) -> str:
    """The criterion of every method, the best first, with accuracies."""
    groups = {method: runs[runs["method"] == method] for method in methods_of(runs)}
    last = {method: curves(group, "loss")[:, -1].tolist() for method, group in groups.items()}
    accuracies = {method: (100 * curves(group, "accuracy")[:, -1]).tolist() for method, group in groups.items()}
    parts = [
        f"{label(method)} {Interval.of(last[method]).text(3)} ({Interval.of(accuracies[method]).text(1)} %)"
        for method in by_mean({method: float(np.mean(values)) for method, values in last.items()})
    ]
    return f"Held-out {CRITERION}, with the accuracy: {', '.join(parts)}."


def by_mean(values: Mapping[str, float], largest: bool = False) -> list[str]:
    """The names of `values`, the best first, the smallest or the `largest`; NaN, of runs that diverged, at the end."""
    sign = -1 if largest else 1
    return sorted(values, key=lambda name: (math.isnan(values[name]), sign * values[name]))


def in_order(values: Mapping[str, float], form: str = ".3g", largest: bool = False) -> str:
    """``EVA 0.641, LoRA 0.789``: the best first, the smallest or the `largest`."""
    return ", ".join(f"{name} {values[name]:{form}}" for name in by_mean(values, largest))


def results_table(runs: pd.DataFrame) -> Table:
    """A row per method. Seconds are medians: the first run of a process is slower."""
    rows: dict[str, dict[str, str]] = {}
    groups = {method: runs[runs["method"] == method] for method in methods_of(runs)}
    losses = {method: _per_epoch(group, curves(group, "loss")) for method, group in groups.items()}
    shown = sorted({epoch for row in losses.values() for epoch in row})
    means = {epoch: [row[epoch].mean for row in losses.values() if epoch in row] for epoch in shown}
    best = {epoch: min((mean for mean in found if math.isfinite(mean)), default=None) for epoch, found in means.items()}
    for method, loss in losses.items():
        group = groups[method]
        accuracy = _per_epoch(group, 100 * curves(group, "accuracy"))
        rows[label(method)] = {
            "Rate": f"{group['lr'].iloc[0]:g}" if adapts_or_trains(method) else NOTHING,
            "Trained": f"{group['trainable_parameters'].mean():,.0f}",
            "Set-up": f"{group['setup_seconds'].median():.2f} s" if adapts_or_trains(method) else NOTHING,
        } | {
            f"Epoch {epoch}": f"{it.text(3)}{'*' * (it.mean == best[epoch])}\n{accuracy[epoch].text(1)} %"
            for epoch, it in loss.items()
        }
    notes = [
        PLUS_MINUS,
        "*: the lowest mean of the column, which says nothing about significance.",
        "Rate: learning rate. Trained: parameters, with head and biases.",
        "Set-up: median time from the pre-trained model to the first training step, with Lightning's own start.",
    ]
    if not all(map(adapts_or_trains, groups)):
        notes.append("Linear: logistic regression on the frozen features, to its end; it has no seed.")
    columns = ["Rate", "Trained", "Set-up", *(f"Epoch {epoch}" for epoch in shown)]
    cells = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).fillna(NOTHING)
    return Table("Held-out cross-entropy and, below it, accuracy", cells.rename_axis("Method"), tuple(notes))


def adapts_or_trains(method: str) -> bool:
    """Whether more than the head is trained, by epochs and at a learning rate."""
    return MethodKey.parse(method).entry.trains != "head"


def paired_differences(runs: pd.DataFrame, pairs: Pairs | None = None) -> list[PairedDifference]:
    """The first method of every pair minus the second, over the seeds that both have; every EVA and LoRA for None."""
    if pairs is None:
        pairs = [(m, "lora") for m in methods_of(runs) if MethodKey.parse(m).state_kind is not None]
    found = []
    for method, baseline in pairs:
        theirs = runs[runs["method"] == baseline]
        ours = runs[(runs["method"] == method) & runs["seed"].isin(theirs["seed"])]
        if ours.empty:
            continue
        theirs = theirs[theirs["seed"].isin(ours["seed"])]
        loss, accuracy = (curves(ours, quantity) - curves(theirs, quantity) for quantity in ("loss", "accuracy"))
        by_epoch = _per_epoch(ours, loss)
        wins = {epoch: int((loss[:, evaluated(ours).index(epoch)] < 0).sum()) for epoch in by_epoch}
        found.append(PairedDifference(method, baseline, len(ours), by_epoch, _per_epoch(ours, 100 * accuracy), wins))
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
    notes = (
        PLUS_MINUS,
        "A difference is clear if its interval excludes 0; a negative loss means that the first method is better.",
    )
    return Table("Differences on the same seeds: held-out loss, accuracy, seeds with a lower loss", cells, notes)


def _per_epoch(runs: pd.DataFrame, values: np.ndarray) -> dict[int, Interval]:
    """Intervals over `runs` of `values` ``(runs, evaluations)``, for the epochs of the tables."""
    epochs = evaluated(runs)
    return {epoch: Interval.of(values[:, epochs.index(epoch)].tolist()) for epoch in shown_epochs(epochs)}


def _curve_figure(runs: pd.DataFrame, quantity: str) -> Figure:
    trained = runs[runs["method"].map(adapts_or_trains)]
    lines = {label(method): curves(trained[trained["method"] == method], quantity) for method in methods_of(trained)}
    last = {name: float(values[:, -1].mean()) for name, values in lines.items()}
    is_share = quantity == "accuracy"
    found = in_order(last, ".1%" if is_share else ".3g", largest=is_share)
    unit = {"loss": "cross-entropy (nats)", "accuracy": "accuracy"}[quantity]
    figure = plots.learning_curves(
        lines,
        unit,
        title=f"Held-out {quantity}",
        percent=is_share,
        order=COLOURED,
        x=evaluated(trained),
    )
    return drawn(
        figure,
        f"Held-out {quantity} by epoch; after the last one, the {'highest' if is_share else 'lowest'} first: {found}",
        "Line: mean over seeds; band: 95% interval.",
    )
