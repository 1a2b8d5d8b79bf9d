"""Comparisons of methods epoch by epoch, whose learning rates are tuned by the held-out loss that their tables show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from experiments.comparisons.tuned import FIRST_TUNING_SEED, TunedComparison
from experiments.report import learning_rates as rates
from experiments.report import page
from experiments.report.epochs import CRITERION, EARLY, EpochComparison
from experiments.report.terminal import say, show


class EpochsCompared(TunedComparison):
    """What the comparisons on digits and on photographs share.

    Attributes:
        evaluated: Epochs after which runs to the end are evaluated, the last of all among them.
    """

    evaluated: tuple[int, ...]
    rule = f"lowest mean {CRITERION} on the validation images, ties to the higher accuracy"

    @property
    def early_epoch(self) -> int:
        """The last epoch that is early; the only one where there is no other."""
        return max((epoch for epoch in self.evaluated[:-1] if epoch <= EARLY[-1]), default=self.evaluated[0])

    @property
    def tuning_seeds(self) -> list[int]:
        """As many as the final runs have, and none of theirs."""
        seeds: int = getattr(self.options, "seeds")  # noqa: B009  # of the settings that derived classes have
        return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds))

    def score(self, metrics: Mapping[str, Any]) -> tuple[float, ...]:
        """Loss, then accuracy, after the last epoch."""
        return metrics["loss"][-1], -metrics["accuracy"][-1]

    def headline(self, metrics: Mapping[str, Any]) -> str:
        """Loss and accuracy."""
        return f"loss {metrics['loss'][-1]:.3f}, {metrics['accuracy'][-1]:.1%} held out"

    def scores(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Accuracy and loss after the last epoch, and the loss after an early one."""
        last = {
            "accuracy": runs["accuracy"].str[-1],
            "loss": runs["loss"].str[-1],
            "early_loss": runs["loss"].str[self.evaluated.index(self.early_epoch)],
        }
        return rates.mean_scores(runs.assign(**last), list(last))

    def scores_table(self, scores: pd.DataFrame, chosen: Mapping[str, float]) -> page.Table:
        """Loss and accuracy."""
        caption = "Mean loss and accuracy on the validation images, last epoch"
        return rates.scores_table(scores, chosen, {"loss": ".3f", "accuracy": ".1%"}, caption)

    def tuning_record(self) -> dict[str, Any]:
        """On what."""
        return {"seeds": self.tuning_seeds, "epochs": self.evaluated[-1], "early_epoch": self.early_epoch}

    def how_tuned(self) -> rates.Tuning:
        """How the learning rates were chosen, with what the grid says about equal ones."""
        known = self.options.tuning or {}
        scores = rates.scores_of(known)
        if scores.empty:
            return self.tuning()
        epochs = {"early_loss": known["early_epoch"], "loss": known["epochs"]}
        sentences = rates.equal_rate_sentences(scores, {name: f"after epoch {n}" for name, n in epochs.items()})
        if known["epochs"] != self.evaluated[-1]:
            sentences.append(f"They were chosen for {known['epochs']} epochs, and here are {self.evaluated[-1]}.")
        return self.tuning(
            sentences=sentences,
            figures=[
                rates.sensitivity_figure(scores, name, f"Loss on the validation images after epoch {epoch}")
                for name, epoch in epochs.items()
            ],
        )


def show_comparison(comparison: EpochComparison, heading: str) -> None:
    """Print one under a heading."""
    say("", heading)
    show(comparison.results)
    if comparison.differences is not None:
        show(comparison.differences)
    say(*comparison.verdicts)
