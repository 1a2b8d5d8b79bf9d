"""The page of a fine-tuning: accuracy, losses by epoch, confused classes, test images, ranks, and what lies where."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eva_lightning import plots
from eva_lightning.vision.data.image_folder import ImageFolderDataModule
from eva_lightning.vision.data.images import load_image
from eva_lightning.vision.data.split_files import Split
from experiments.finetune.outcome import loading
from experiments.finetune.settings import OneRun, Settings
from experiments.report import page
from experiments.report.ranks import rank_figure
from experiments.runner.settings import Role, flag, role_of
from experiments.vtab.settings import weights_in_words

#: Classes in the table of confusions, images shown of those that are recognised and of the others, and their pixels.
WORST, SHOWN, PIXELS = 10, 6, 160
#: Options that are always part of the command that repeats a run.
_REPEATED = ("data", "model", "weights", "method", "rank", "lr", "epochs", "batch_size", "image_size", "seed")
_PACKAGES = ("torch", "lightning", "timm", "peft")


def write_report(
    file: Path,
    run: OneRun,
    data: ImageFolderDataModule,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
) -> None:
    """Write the page of a finished run to `file`.

    Args:
        file: Where to.
        run: What was asked for.
        data: Its images.
        metrics: What came out, with ``predicted``, ``confidence`` and ``interval``.
        history: A row per epoch.
    """
    test, names = data.data.evaluation, data.class_names
    wrong = [
        place for place, pair in enumerate(zip(test.labels, metrics["predicted"], strict=True)) if pair[0] != pair[1]
    ]
    right = sorted(set(range(len(test))) - set(wrong))
    body = page.render(
        "finetune.html",
        warnings=data.data.warnings,
        facts=_facts(run, data, metrics),
        curves=_curves(history),
        confusion=confusion(test.labels, metrics["predicted"], names),
        mistakes=[_sample(test, place, names, metrics) for place in wrong[:SHOWN]],
        recognised=[_sample(test, place, names, metrics) for place in right[:SHOWN]],
        count=len(wrong),
        ranks=rank_figure([metrics["ranks"]], run.rank, "Ranks of EVA") if metrics.get("ranks") else None,
        tuning=_rates(metrics),
        loading=loading(file.parent, metrics),
        command=_command(run),
    )
    section = page.Section("Fine-tuning", body, (verdict(test, metrics),), _data(metrics, history))
    page.write_page(file, f"{data.data.task.name}: {len(names)} classes", [section])


def verdict(test: Split, metrics: Mapping[str, Any]) -> str:
    """The result in a sentence, beside what needs no model."""
    most = max(Counter(test.labels).values()) / len(test)
    low, high = metrics["interval"]
    return (
        f"{metrics['accuracy']:.1%} of {page.counted(len(test), 'test image')} are recognised (95% interval {low:.1%} "
        f"to {high:.1%}, Wilson's, over images); the most frequent class alone would be right for {most:.1%}."
    )


def _data(metrics: Mapping[str, Any], history: Sequence[Mapping[str, float]]) -> tuple[page.Data, ...]:
    return (
        *page.runs_as_data("run", "the run", [metrics]),
        *page.runs_as_data("epochs", "its epochs", history),
    )


def confusion(labels: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> page.Table:
    """The classes that are recognised worst, and what their images are taken for."""
    taken = {label: Counter[int]() for label in sorted(set(labels))}
    for label, found in zip(labels, predicted, strict=True):
        taken[label][found] += 1
    worst = sorted(taken, key=lambda label: (taken[label][label] / taken[label].total(), label))
    rows = {}
    for label in worst[:WORST]:
        others = [(found, count) for found, count in taken[label].most_common() if found != label][:3]
        rows[names[label]] = {
            "Test images": f"{taken[label].total()}",
            "Recognised": f"{taken[label][label] / taken[label].total():.0%}",
            "Taken for": ", ".join(f"{names[found]} ({count})" for found, count in others) or "–",
        }
    cells = pd.DataFrame.from_dict(rows, orient="index").rename_axis("Class")
    title = "All classes, worst first" if len(worst) <= WORST else f"The {WORST} worst of {len(worst)} classes"
    return page.Table(title, cells, ("In brackets: how many of the class's test images.",))


def _facts(run: OneRun, data: ImageFolderDataModule, metrics: Mapping[str, Any]) -> dict[str, str]:
    checked = data.data
    validation = "none" if checked.validation is None else str(len(checked.validation))
    versions = ", ".join(f"{name} {version}" for name, version in page.versions(_PACKAGES).items())
    adapter = f", r = {run.rank}" if run.key.adapts else ""
    return {
        "Images": f"{len(checked.train)} to train, {validation} to validate, {len(checked.evaluation)} to test, "
        f"{run.image_size} pixels",
        "Model": f"{run.model}; {weights_in_words(run.weights)}",
        "Method": f"{run.key.label}{adapter}; {metrics['trainable_parameters']:,} of {metrics['total_parameters']:,} "
        "parameters trained",
        "Training": f"learning rate {run.lr:g}{' (chosen below)' if metrics['tuning'] else ''}, {run.epochs} epochs, "
        f"batches of {run.batch_size}, seed {run.seed}; {metrics['train_seconds']:.0f} s on {metrics['device']}",
        "Machine": page.machine(),
        "Versions": versions,
    }


def _curves(history: Sequence[Mapping[str, float]]) -> list[page.Figure]:
    figures = []
    for quantity, unit in (("loss", "cross-entropy (nats)"), ("accuracy", "accuracy")):
        lines = {
            name: np.array([[row[f"{stage}_{quantity}"] for row in history]])
            for stage, name in (("train", "training"), ("val", "validation"))
            if history and all(f"{stage}_{quantity}" in row for row in history)
        }
        if lines:
            last = ", ".join(f"{name} {values[0, -1]:.3g}" for name, values in lines.items())
            title = f"{quantity.capitalize()} by epoch"
            figure = plots.learning_curves(lines, unit, title=title, percent=quantity == "accuracy")
            figures.append(page.drawn(figure, f"{title}; after the last: {last}"))
    return figures


def _sample(split: Split, place: int, names: Sequence[str], metrics: Mapping[str, Any]) -> page.Figure:
    truth, found = names[split.labels[place]], names[metrics["predicted"][place]]
    mark = "✓" if truth == found else "✗"
    caption = f"{truth}\n{mark} {found}, {metrics['confidence'][place]:.0%}"
    pixels = load_image(split.folder / split.paths[place], PIXELS)
    return page.thumbnail(pixels, f"Test image of {truth}, taken for {found}", caption)


def _rates(metrics: Mapping[str, Any]) -> page.Table | None:
    rows = {
        f"{row['lr']:g}": {
            "Validation loss": f"{row['loss']:.4g}{' *' * (row['lr'] == metrics['lr'])}",
            "Accuracy": f"{row['accuracy']:.1%}",
        }
        for row in metrics["tuning"]
    }
    if not rows:
        return None
    cells = pd.DataFrame.from_dict(rows, orient="index").rename_axis("Learning rate")
    return page.Table("Learning rates tried on the validation images", cells, ("*: the one chosen, one seed each.",))


def _command(run: OneRun) -> str:
    """The command that does the same training: what matters most, and whatever is not as it would be by itself."""
    words = ["eva-lightning", "finetune"]
    for item in fields(Settings):
        value = getattr(run, item.name, item.default)
        decides = Role.RESULT in role_of(item) or item.name == "split_file"
        if item.name in _REPEATED or (decides and value != item.default):
            words += [flag(item.name), _word(value)]
    return shlex.join(words)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
