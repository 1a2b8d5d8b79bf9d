"""From the runs of the demo to the numbers it reports: means, standard errors and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eva_lightning.plots import mean_and_standard_error
from experiments.demo_runs import METHODS, RunResult

EARLY = (1, 2, 3)


@dataclass(frozen=True)
class Estimate:
    """A mean over runs and its standard error (NaN for a single run)."""

    mean: float
    error: float

    def text(self, digits: int, scale: float = 1.0, sign: bool = False) -> str:
        """``"0.513 ±0.012"``; the part from ± on is left out where there is no error."""
        mean = f"{self.mean * scale:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.error) else f"{mean} ±{self.error * scale:.{digits}f}"


@dataclass(frozen=True)
class MethodSummary:
    """One row of the table. ``loss`` and ``accuracy`` are keyed by epoch."""

    method: str
    learning_rate: float
    n_runs: int
    loss: dict[int, Estimate]
    accuracy: dict[int, Estimate]
    trainable_parameters: Estimate
    setup_seconds: float
    run_seconds: float

    @property
    def name(self) -> str:
        return METHODS[self.method]


@dataclass(frozen=True)
class PairedDifference:
    """``method`` minus ``baseline`` on the same seeds, keyed by epoch. ``wins``: seeds with a lower loss."""

    method: str
    baseline: str
    n_pairs: int
    loss: dict[int, Estimate]
    accuracy: dict[int, Estimate]
    wins: dict[int, int]

    @property
    def name(self) -> str:
        return f"{METHODS[self.method]} − {METHODS[self.baseline]}"

    def verdict(self, epoch: int) -> str:
        """The loss difference after ``epoch`` in words: clear means more than two standard errors."""
        difference = self.loss[epoch]
        if math.isnan(difference.error):
            return "undecided (one seed)"
        if abs(difference.mean) <= 2 * difference.error:
            return "no clear difference"
        return "ahead" if difference.mean < 0 else "behind"


def shown_epochs(n_epochs: int) -> list[int]:
    """The epochs of the table: 1, 2, 3 and the last."""
    return sorted({epoch for epoch in EARLY if epoch < n_epochs} | {n_epochs})


def by_method(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """Results grouped by method, in the order of ``METHODS``, each group sorted by seed."""
    groups: dict[str, list[RunResult]] = {method: [] for method in METHODS}
    for result in results:
        groups[result.run.method].append(result)
    return {method: sorted(group, key=lambda r: r.run.seed) for method, group in groups.items() if group}


def curves(results: Sequence[RunResult], quantity: str) -> np.ndarray:
    """``"loss"`` or ``"accuracy"`` of every run, shape ``(runs, epochs)``."""
    return np.array([getattr(result, quantity) for result in results], dtype=float)


def _per_epoch(values: np.ndarray, epochs: Sequence[int]) -> dict[int, Estimate]:
    mean, error = mean_and_standard_error(values)
    return {epoch: Estimate(float(mean[epoch - 1]), float(error[epoch - 1])) for epoch in epochs}


def summarise(results: Sequence[RunResult]) -> list[MethodSummary]:
    """One summary per method. Seconds are medians: the first run of a process also pays for imports."""
    rows = []
    for method, group in by_method(results).items():
        loss = curves(group, "loss")
        epochs = shown_epochs(loss.shape[1])
        parameters, spread = mean_and_standard_error(np.array([r.trainable_parameters for r in group]))
        rows.append(
            MethodSummary(
                method=method,
                learning_rate=group[0].run.learning_rate,
                n_runs=len(group),
                loss=_per_epoch(loss, epochs),
                accuracy=_per_epoch(curves(group, "accuracy"), epochs),
                trainable_parameters=Estimate(float(parameters), float(spread)),
                setup_seconds=float(np.median([r.setup_seconds for r in group])),
                run_seconds=float(np.median([r.seconds for r in group])),
            )
        )
    return rows


def paired_differences(results: Sequence[RunResult], baseline: str = "lora") -> list[PairedDifference]:
    """Every EVA method against ``baseline``, over the seeds that both have."""
    groups: Mapping[str, dict[int, RunResult]] = {
        method: {result.run.seed: result for result in group} for method, group in by_method(results).items()
    }
    if baseline not in groups:
        return []
    rows = []
    for method, runs in groups.items():
        seeds = sorted(runs.keys() & groups[baseline].keys())
        if not method.startswith("eva") or not seeds:
            continue
        ours, theirs = [runs[seed] for seed in seeds], [groups[baseline][seed] for seed in seeds]
        loss = curves(ours, "loss") - curves(theirs, "loss")
        epochs = shown_epochs(loss.shape[1])
        rows.append(
            PairedDifference(
                method=method,
                baseline=baseline,
                n_pairs=len(seeds),
                loss=_per_epoch(loss, epochs),
                accuracy=_per_epoch(curves(ours, "accuracy") - curves(theirs, "accuracy"), epochs),
                wins={epoch: int((loss[:, epoch - 1] < 0).sum()) for epoch in epochs},
            )
        )
    return rows


def _enumerated(items: Sequence[Any]) -> str:
    """``1``, ``1 and 2``, ``1, 2 and 3``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def verdict_sentence(difference: PairedDifference) -> str:
    """What the paired differences of one method say, in one sentence."""
    epochs: dict[str, list[int]] = {}
    for epoch in difference.loss:
        epochs.setdefault(difference.verdict(epoch), []).append(epoch)
    parts = [
        f"{verdict} after epoch{'s' if len(which) > 1 else ''} {_enumerated(which)}"
        for verdict, which in epochs.items()
    ]
    against = f"{METHODS[difference.method]} against {METHODS[difference.baseline]}"
    return f"{against}, held-out loss over {difference.n_pairs} paired seeds: {'; '.join(parts)}."


def same_rate_sentences(tuning: Mapping[str, Any], baseline: str = "lora") -> list[str]:
    """At how many learning rates of the tuning grid an EVA method's mean loss is below that of ``baseline``."""
    scores = tuning.get("scores") or {}
    sentences = []
    for method, row in scores.items():
        if not method.startswith("eva") or baseline not in scores:
            continue
        rates = sorted(row.keys() & scores[baseline].keys())
        early, late = (
            sum(row[rate][key] < scores[baseline][rate][key] for rate in rates) for key in ("early_loss", "loss")
        )
        sentences.append(
            f"At equal learning rates, over the grid of the tuning: {METHODS[method]} has a lower mean loss than "
            f"{METHODS[baseline]} at {early} of {len(rates)} rates after epoch {tuning['early_epoch']} and at "
            f"{late} of {len(rates)} after epoch {tuning['epochs']}."
        )
    return sentences
