"""The report of the transfer comparison: ``results.csv``, ``report.md``, ``curves.png`` and ``differences.png``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparisons.figures import curves_figure, differences_figure
from experiments.comparisons.report import (
    REFERENCE,
    SIGNIFICANCE,
    Evidence,
    Quantity,
    cell,
    difference_sentence,
    differences_table,
    learning_rates,
    machine,
    mean_column,
    means_table,
    significance_sentence,
    spread,
    state_of,
    table,
    write_report,
)
from experiments.comparisons.transfer import NOT_PRETRAINED, Settings
from experiments.comparisons.transfer_data import Halves
from experiments.comparisons.transfer_run import adapts
from experiments.runner.comparison import Results
from experiments.runner.statistics import PLUS_MINUS

#: Panels of the curves: title -> methods, beside LoRA; methods in none of them have one of their own.
GROUPS: dict[str, tuple[str, ...]] = {
    "what pre-training is worth": ("linear-random", "scratch", "linear", "fft"),
    "other adapters than LoRA's": ("dora", "rslora", "lora+", "adalora", "lora-redistribute"),
    "initialised from weights, gradients or covariances": ("pissa", "milora", "olora", "corda", "lora-ga"),
    "EVA and its ablations": (
        "eva:1", "eva", "eva-dora", "eva-whiten", "eva-rotate", "eva-permute", "eva-minor",
    ),
}  # fmt: skip


def write(settings: Settings, parts: Halves, pretraining: Mapping[str, Any], results: Results) -> Path:
    """Write all files.

    Args:
        settings: What was asked for.
        parts: The images.
        pretraining: Metrics of the pre-training.
        results: Of the finished runs.

    Returns:
        The report.
    """
    runs = spread(results.runs, "evaluations", "epoch")
    evidence = Evidence.of(settings, runs)
    losses = {epoch: Quantity(f"loss_{epoch}", f"test loss, epoch {epoch}") for epoch in settings.evaluated_epochs}
    accuracies = [_accuracy("accuracy", settings.epochs), _accuracy("class_accuracy", settings.epochs)]
    others = [key for key in evidence.against_reference if key not in NOT_PRETRAINED]
    quantities = [*losses.values(), *accuracies]
    figures = {}
    if evidence.labels:
        curves = curves_figure(_panels(evidence), losses, "epoch", "test loss (nats)")
        figures["curves"] = curves, "test loss by epoch, in groups of methods"
    # linear probing and full fine-tuning differ so much that nothing else could be seen beside them
    if adapted := list(filter(adapts, others)):
        differences = differences_figure(evidence, quantities, adapted)
        figures["differences"] = differences, "differences of the methods with adapters to LoRA, with their intervals"
    texts = [
        "# Transfer on real images: half of Caltech101 to the other half",
        _conditions(settings, parts, pretraining, results),
        state_of(results, len(settings.labels) * settings.seeds),
        "## In short",
        _in_short(evidence, list(losses.values()), accuracies[0], others),
        "## Test accuracy and loss",
        _results(settings, evidence, results, [*accuracies, losses[settings.epochs]]),
        "## Test loss during training",
        means_table(evidence, list(losses.values())),
        "curves",
        "differences",
        "## Minus LoRA, run by run",
        differences_table(evidence, quantities, others),
        "## Learning rates",
        learning_rates(
            settings,
            results,
            f"Loss on the {settings.validation_images} validation images after training on the other "
            f"{settings.train_images - settings.validation_images} (the paper takes the best accuracy; on so few images "
            "and seeds the loss says more)",
            "{:.3f}".format,
        ),
        "## Pre-training",
        _pretraining(pretraining),
    ]
    return write_report(settings.output, texts, figures, runs)


def _accuracy(name: str, epoch: int) -> Quantity:
    title = {"accuracy": "accuracy, points", "class_accuracy": "mean class accuracy, points"}[name]
    return Quantity(f"{name}_{epoch}", title, 1, scale=100, higher_is_better=True)


def _panels(evidence: Evidence) -> dict[str, Evidence]:
    grouped = {key for group in GROUPS.values() for key in (*group, REFERENCE)}
    groups = {**GROUPS, "others": tuple(key for key in evidence.labels if key not in grouped)}
    shown = {title: [key for key in group if key in evidence.labels] for title, group in groups.items()}
    shown = {title: keys for title, keys in shown.items() if keys} or {"": []}
    return {
        title: evidence.among([key for key in evidence.labels if key in keys or key == REFERENCE])
        for title, keys in shown.items()
    }


def _conditions(settings: Settings, parts: Halves, pretraining: Mapping[str, Any], results: Results) -> str:
    first, second = parts.classes
    return (
        f"A ViT of 0.23 M parameters (48x48 images, 12x12 patches, width 64, 4 blocks) was pre-trained on "
        f"{len(parts.pretraining):,} images of {first} classes for {settings.pretrain_epochs} epochs of random crops. "
        f"Each method then fine-tuned it on the same {len(parts.train):,} images of the other {second} classes: "
        f"{settings.epochs} epochs at batch size {settings.batch_size}, AdamW with weight decay "
        f"{settings.weight_decay:g}, {settings.warmup_epochs:g} epoch(s) of warm-up and cosine decay, no augmentation, "
        f"rank {settings.rank} for every method with adapters (a mean where ranks are redistributed), α = "
        f"{settings.alpha:g}, biases and head trained. It is tested on the {len(parts.test):,} other images of these "
        f"classes. Seeds 0 to {settings.seeds - 1} change the head, the order of images and the random parts of "
        "initialisations, not the images and not the pre-trained weights: intervals say what another seed would give, "
        "not what another data set would.\n\n"
        f"{len(results.runs)} runs compared. Pre-training took {pretraining['seconds'] / 60:.0f} core-minutes, tuning "
        f"and comparison {results.seconds / 60:.0f}; {machine()}, one thread per run."
    )


def _in_short(evidence: Evidence, losses: Sequence[Quantity], accuracy: Quantity, others: Sequence[str]) -> str:
    lines = []
    worth = {
        "linear": "a linear probe on the pre-trained network reaches",
        "linear-random": "on a random one",
        "scratch": "training everything from random weights",
        "fft": "full fine-tuning",
        "lora": "LoRA",
    }
    reached = [f"{text} {found.text(1)}" for key, text in worth.items() if (found := evidence.mean(key, accuracy))]
    if reached:
        lines.append(f"- Test accuracy in %: {', '.join(reached)}.")
    for first, second in evidence.pairs:
        lines += difference_sentence(evidence, first, second, losses)
    for quantity in (losses[0], losses[-1], accuracy):
        lines += significance_sentence(evidence, quantity, others)
    return "\n".join([*lines, "", SIGNIFICANCE])


def _results(settings: Settings, evidence: Evidence, results: Results, quantities: Sequence[Quantity]) -> str:
    rows = {
        label: [
            f"{results.choices[key].point.get('lr'):g}",
            *(cell(evidence.mean(key, each), each.digits) for each in quantities),
            mean_column(evidence.runs, key, "trainable_parameters", 0),
            mean_column(evidence.runs, key, "seconds", 1),
        ]
        for key, label in evidence.labels.items()
    }
    text = (
        f"After epoch {settings.epochs}. Mean class accuracy counts every class alike; three classes are more than half "
        f"of the test images. Seconds are the processor's, for one run with all evaluations on the test images. "
        f"{PLUS_MINUS}"
    )
    head = ["learning rate", "accuracy, %", "mean class accuracy, %", "loss", "trained parameters", "seconds"]
    return f"{text}\n\n" + table("", head, rows)


def _pretraining(metrics: Mapping[str, Any]) -> str:
    evaluations = metrics["evaluations"]
    rows = {
        "loss": [f"{row['loss']:.3f}" for row in evaluations],
        "accuracy, %": [f"{100 * row['accuracy']:.1f}" for row in evaluations],
        "mean class accuracy, %": [f"{100 * row['class_accuracy']:.1f}" for row in evaluations],
    }
    text = f"On held-out images of the {metrics['classes']} classes of the pre-training, by epoch."
    return f"{text}\n\n" + table("epoch", [f"{row['epoch']:.0f}" for row in evaluations], rows)
