"""The report of the transfer comparison: ``results.csv``, ``report.md``, ``curves.png`` and ``differences.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparisons.evidence import REFERENCE, Evidence, Quantity
from experiments.comparisons.figures import curves_figure, differences_figure
from experiments.comparisons.report import (
    against_reference,
    difference_sentences,
    means_table,
    significance_sentence,
    sizes_table,
    table,
    tuning,
    write_report,
)
from experiments.comparisons.transfer import NOT_PRETRAINED, Settings
from experiments.comparisons.transfer_data import Halves
from experiments.runner.comparison import Results

#: Panels of the curves: title -> methods, beside LoRA; methods in none of them have one of their own.
GROUPS: dict[str, tuple[str, ...]] = {
    "what pre-training is worth": ("linear-random", "scratch", "linear", "fft"),
    "other adapters than LoRA's": ("dora", "rslora", "lora+", "adalora", "lora-redistribute"),
    "initialised from weights, gradients or covariances": (
        "pissa",
        "milora",
        "olora",
        "ailora",
        "corda",
        "corda-kpm",
        "lora-ga",
        "lora-ga-peft",
        "lora-da",
        "lora-one",
        "gora",
        "eva-gradient",
    ),
    "EVA and its ablations": (
        "eva:1",
        "eva",
        "eva-dora",
        "orthonormal",
        "eva-whiten",
        "eva-lora-norm",
        "eva-rotate",
        "eva-permute",
        "eva-minor",
    ),
}

#: Method -> how the summary introduces its accuracy.
WORTH = {
    "linear": "a linear probe on the pre-trained network reaches",
    "linear-random": "on a random one",
    "scratch": "training everything from random weights",
    "fft": "full fine-tuning",
    REFERENCE: "LoRA",
}

SIZES = {
    "trained parameters": ("trainable_parameters", 0),
    "initialisation, s": ("init_seconds", 2),
    "all, s": ("seconds", 1),
}


def write(settings: Settings, parts: Halves, pretraining: Mapping[str, Any], results: Results) -> Path:
    """Write all files; returns the report.

    Args:
        settings: What was asked for.
        parts: The images.
        pretraining: Metrics of the pre-training.
        results: Of the finished runs.
    """
    evidence = Evidence.of(settings, results.runs, "evaluations", "epoch")
    losses = {epoch: Quantity(f"loss_{epoch}", f"test loss after epoch {epoch}") for epoch in settings.evaluated_epochs}
    accuracy, class_accuracy = (
        Quantity(f"{name}_{settings.epochs}", title, "%", 1, scale=100, higher_is_better=True)
        for name, title in (("accuracy", "accuracy"), ("class_accuracy", "mean class accuracy"))
    )
    quantities = [*losses.values(), accuracy, class_accuracy]
    others = [key for key in evidence.against_reference if key not in NOT_PRETRAINED]
    figures = {"curves": curves_figure(_panels(evidence), losses, "epoch", "test cross-entropy (nats)")}
    if evidence.adapters:
        figures["differences"] = differences_figure(evidence, quantities, evidence.adapters)
    context = {
        "wanted": len(settings.labels) * settings.seeds,
        "parts": parts,
        "pretraining": _pretraining(pretraining),
        "in_short": _in_short(evidence, list(losses.values()), accuracy, others),
        "means": means_table(evidence, [accuracy, class_accuracy, losses[settings.epochs]]),
        "curves": means_table(evidence, list(losses.values())),
        "differences": against_reference(evidence, quantities, others),
        "tuning": tuning(settings, results, "{:.3f}".format),
        "sizes": sizes_table(evidence, SIZES),
    }
    return write_report("transfer", settings, results, evidence, figures, context)


def _panels(evidence: Evidence) -> dict[str, Evidence]:
    grouped = {key for group in GROUPS.values() for key in group}
    groups = {**GROUPS, "others": tuple(key for key in evidence.labels if key not in grouped and key != REFERENCE)}
    shown = {title: evidence.among([*group, REFERENCE]) for title, group in groups.items()}
    return {title: part for title, part in shown.items() if set(part.labels) - {REFERENCE}} or {"": evidence}


def _in_short(evidence: Evidence, losses: Sequence[Quantity], accuracy: Quantity, others: Sequence[str]) -> str:
    means = evidence.means(accuracy)
    reached = [f"{text} {means[key].text(1)}" for key, text in WORTH.items() if key in means]
    lines = [f"- Test accuracy in %: {', '.join(reached)}."] if reached else []
    lines += difference_sentences(evidence, losses)
    for quantity in dict.fromkeys((losses[0], losses[-1], accuracy)):
        lines += significance_sentence(evidence, quantity, others)
    return "\n".join(lines)


def _pretraining(metrics: Mapping[str, Any]) -> dict[str, str]:
    evaluations = metrics["evaluations"]
    rows = {
        "loss": [f"{row['loss']:.3f}" for row in evaluations],
        "accuracy, %": [f"{100 * row['accuracy']:.1f}" for row in evaluations],
        "mean class accuracy, %": [f"{100 * row['class_accuracy']:.1f}" for row in evaluations],
    }
    text = table("epoch", [f"{row['epoch']:.0f}" for row in evaluations], rows)
    return {"table": text, "minutes": f"{metrics['seconds'] / 60:.0f}"}
