"""What the transfer experiment writes: ``results.csv``, ``report.md``, ``curves.png`` and ``differences.png``."""

from __future__ import annotations

import csv
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.runner.statistics import Interval
from experiments.vtab.transfer_plots import curves_figure, differences_figure
from experiments.vtab.transfer_runs import Variant, halves

if TYPE_CHECKING:
    from experiments.vtab.transfer import Rates, Scores, Settings

Run = Mapping[str, Any]
Value = Callable[[Run], float]

#: What every method is compared with, run by run.
REFERENCE = "lora"


def look(epoch: int, name: str, scale: float = 1.0) -> Value:
    """Value of a run: `name` (``loss``, ``accuracy``, ``class_accuracy``) on the test images after `epoch`."""

    def value(run: Run) -> float:
        return scale * next(float(row[name]) for row in run["looks"] if row["epoch"] == epoch)

    return value


def over_seeds(runs: Sequence[Run], variant: str, value: Value) -> Interval | None:
    """Interval over the seeds of a method; None where there are no runs."""
    values = [value(run) for run in runs if run["variant"] == variant]
    return Interval.of(values) if values else None


def paired(runs: Sequence[Run], first: str, second: str, value: Value) -> Interval | None:
    """Interval over seeds of `first` minus `second`; both of a pair have the same images in the same order.

    Seeds that lack one of the two are left out; None where no seed is left.
    """
    a, b = ({run["seed"]: value(run) for run in runs if run["variant"] == key} for key in (first, second))
    differences = [a[seed] - b[seed] for seed in sorted(a) if seed in b]
    return Interval.of(differences) if differences else None


def write_report(
    settings: Settings,
    pretraining: Mapping[str, Any],
    scores: Scores,
    rates: Rates,
    runs: Sequence[Run],
    failures: Sequence[tuple[str, str]],
    seconds: float,
) -> Path:
    """Write all files.

    Args:
        settings: What was asked for.
        pretraining: Metrics of the pre-training.
        scores: Loss on the validation images by method and rate.
        rates: Learning rate of each method.
        runs: Metrics of the finished runs of the comparison.
        failures: Run and reason, of those that failed.
        seconds: Processor seconds of all runs, the tuning included.

    Returns:
        The report.
    """
    folder = Path(settings.output)
    _write_csv(folder / "results.csv", settings, runs)
    found = [variant for variant in settings.variants if any(run["variant"] == variant.key for run in runs)]
    pictures = []
    if runs:
        labels = {variant.key: variant.label for variant in found}
        curves_figure(runs, labels, settings.look_epochs).savefig(folder / "curves.png", dpi=110)
        pictures.append("![test loss by epoch, in four groups of methods](curves.png)")
    others = [variant for variant in found if variant.key != REFERENCE and variant.pretrained]
    if others and any(run["variant"] == REFERENCE for run in runs):
        # linear probing and full fine-tuning differ so much that nothing else could be seen beside them
        labels = {variant.key: variant.label for variant in others if variant.adapts}
        differences_figure(_columns(settings, runs, others), labels).savefig(folder / "differences.png", dpi=110)
        pictures.append("![differences of the methods with adapters to LoRA, with their intervals](differences.png)")
    parts = [
        "# Transfer on real images: half of Caltech101 to the other half",
        _conditions(settings, pretraining, runs, seconds),
        _failures(settings, rates, runs, failures),
        "## In short",
        _in_short(settings, runs, others),
        "## Test accuracy and loss",
        _results(settings, rates, runs, found),
        "## Test loss on the way",
        _curves(settings, runs, found),
        *pictures,
        "## Minus LoRA, run by run",
        _differences(settings, runs, others),
        "## Learning rates",
        _rates(settings, scores, rates),
        "## Pre-training",
        _pretraining(pretraining),
    ]
    report = folder / "report.md"
    temporary = report.with_suffix(".part")
    temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    temporary.replace(report)
    return report


def _columns(
    settings: Settings, runs: Sequence[Run], others: Sequence[Variant]
) -> dict[str, dict[str, Interval | None]]:
    """Title -> method -> its difference to LoRA."""
    values = {f"test loss, epoch {epoch}": look(epoch, "loss") for epoch in settings.look_epochs}
    last = settings.epochs
    values |= {
        "accuracy, points": look(last, "accuracy", 100),
        "mean class accuracy, points": look(last, "class_accuracy", 100),
    }
    return {
        title: {variant.key: paired(runs, variant.key, REFERENCE, value) for variant in others}
        for title, value in values.items()
    }


def _conditions(settings: Settings, pretraining: Mapping[str, Any], runs: Sequence[Run], seconds: float) -> str:
    parts = halves(settings.root, settings.split_seed, settings.train_images, settings.validation_images)
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
        f"{len(runs)} runs compared. Pre-training took {pretraining['seconds'] / 60:.0f} core-minutes, tuning and "
        f"comparison {seconds / 60:.0f}; {os.cpu_count()} cores ({platform.machine()}), one thread per run."
    )


def _failures(settings: Settings, rates: Rates, runs: Sequence[Run], failures: Sequence[tuple[str, str]]) -> str:
    lines = [f"- {name}: {reason}" for name, reason in failures]
    if lines:
        return "\n".join([f"**{len(failures)} runs failed** and are not in the tables:", "", *lines])
    wanted = len(settings.variants) * settings.seeds
    return "" if len(runs) == wanted else f"**Unfinished:** {len(runs)} of {wanted} runs."


def _in_short(settings: Settings, runs: Sequence[Run], others: Sequence[Variant]) -> str:
    last = settings.epochs
    lines = []
    worth = [
        f"{label} {found.text(1)}"
        for key, label in (
            ("linear", "a linear probe on the pre-trained network reaches"),
            ("linear-random", "on a random one"),
            ("scratch", "training everything from random weights"),
            ("fft", "full fine-tuning"),
            ("lora", "LoRA"),
        )
        if (found := over_seeds(runs, key, look(last, "accuracy", 100))) is not None
    ]
    if worth:
        lines.append(f"- Test accuracy in %: {', '.join(worth)}.")
    labels = {variant.key: variant.label for variant in others} | {REFERENCE: "LoRA"}
    for variant in others:
        if variant.method not in ("eva", "eva-dora"):
            continue
        for baseline in (REFERENCE, "dora") if variant.method == "eva-dora" and "dora" in labels else (REFERENCE,):
            words = []
            for epoch in settings.look_epochs:
                found = paired(runs, variant.key, baseline, look(epoch, "loss"))
                if found is not None:
                    words.append(f"{found.text(3, sign=True)} after epoch {epoch}{_verdict(found)}")
            if words:
                lines.append(f"- {variant.label} minus {labels[baseline]}, test loss: {'; '.join(words)}.")
    for title, value, digits in (
        (f"test loss after epoch {settings.look_epochs[0]}", look(settings.look_epochs[0], "loss"), 3),
        ("test loss at the end", look(last, "loss"), 3),
        ("accuracy at the end, in points", look(last, "accuracy", 100), 1),
    ):
        lines += _separated(runs, others, title, value, digits, better=-1 if "loss" in title else 1)
    note = (
        "± is half a 95% interval (t distribution) over seeds; differences are taken within a seed. The intervals are "
        "not corrected for the number of comparisons: where no method differs from LoRA, one in twenty would still "
        "exclude 0. A star marks what remains after Bonferroni's correction for the number of methods."
    )
    return "\n".join([*lines, "", note])


def _verdict(interval: Interval) -> str:
    if interval.half is None:
        return ""
    return " (0 excluded)" if interval.excludes_zero else " (0 included)"


def _separated(
    runs: Sequence[Run], others: Sequence[Variant], title: str, value: Value, digits: int, better: int
) -> list[str]:
    """Which methods differ from LoRA by more than their interval."""
    found = [(variant, paired(runs, variant.key, REFERENCE, value)) for variant in others]
    known = [(variant, interval) for variant, interval in found if interval is not None and interval.half is not None]
    if not known:
        return []
    groups: list[str] = []
    for name, sign in (("better", better), ("worse", -better)):
        members = [(v, i) for v, i in known if i.excludes_zero and i.mean * sign > 0]
        members.sort(key=lambda member: -abs(member[1].mean))
        words = ", ".join(
            f"{variant.label} ({interval.mean:+.{digits}f}{'*' if _remains(interval, len(known)) else ''})"
            for variant, interval in members
        )
        groups.append(f"{name} than LoRA: {words or 'none'}")
    same = len(known) - sum(interval.excludes_zero for _, interval in known)
    return [f"- {title[0].upper()}{title[1:]}: {'; '.join(groups)}; not told apart from LoRA: {same} of {len(known)}."]


def _remains(interval: Interval, comparisons: int) -> bool:
    """Whether 0 lies outside of the interval at the level 1 - 0.05 / `comparisons`, too."""
    from scipy.special import stdtrit

    degrees = interval.n - 1
    wider = float(stdtrit(degrees, 1 - 0.025 / comparisons) / stdtrit(degrees, 0.975))
    return interval.half is not None and abs(interval.mean) > wider * interval.half


def _results(settings: Settings, rates: Rates, runs: Sequence[Run], found: Sequence[Variant]) -> str:
    last = settings.epochs
    rows = []
    for variant in found:
        mine = [run for run in runs if run["variant"] == variant.key]
        rows.append(
            [
                variant.label,
                f"{rates[variant.key]:g}" if variant.key in rates else "",
                _cell(over_seeds(runs, variant.key, look(last, "accuracy", 100)), 1),
                _cell(over_seeds(runs, variant.key, look(last, "class_accuracy", 100)), 1),
                _cell(over_seeds(runs, variant.key, look(last, "loss")), 3),
                f"{statistics.fmean(run['trainable_parameters'] for run in mine):,.0f}",
                f"{statistics.fmean(run['seconds'] for run in mine):.1f}",
            ]
        )
    head = ["", "learning rate", "accuracy, %", "mean class accuracy, %", "loss", "trained parameters", "seconds"]
    text = (
        f"After epoch {last}. Mean class accuracy counts every class alike; three classes are more than half of the "
        "test images. Seconds are the processor's, for one run with all looks at the test images."
    )
    return f"{text}\n\n" + _table(head, rows)


def _curves(settings: Settings, runs: Sequence[Run], found: Sequence[Variant]) -> str:
    rows = [
        [v.label, *(_cell(over_seeds(runs, v.key, look(epoch, "loss")), 3) for epoch in settings.look_epochs)]
        for v in found
    ]
    return _table(["epoch", *map(str, settings.look_epochs)], rows)


def _differences(settings: Settings, runs: Sequence[Run], others: Sequence[Variant]) -> str:
    columns = _columns(settings, runs, others)
    rows = [
        [
            variant.label,
            *(_cell(cells[variant.key], 1 if "points" in title else 3, sign=True) for title, cells in columns.items()),
        ]
        for variant in others
    ]
    return "Bold where the interval excludes 0.\n\n" + _table(["", *columns], rows)


def _rates(settings: Settings, scores: Scores, rates: Rates) -> str:
    tried = sorted({lr for worth in scores.values() for lr in worth})
    rows, edges = [], []
    for variant in settings.variants:
        worth = scores.get(variant.key, {})
        if not worth:
            continue
        chosen = rates.get(variant.key)
        cells = [f"{worth[lr]:.3f}" if lr in worth else "" for lr in tried]
        rows.append(
            [variant.label, *(f"**{c}**" if c and lr == chosen else c for lr, c in zip(tried, cells, strict=True))]
        )
        if chosen in (min(worth), max(worth)):
            edges.append(variant.label)
    if not rows:
        return "All given."
    text = (
        f"Loss on the {settings.validation_images} validation images after training on the other "
        f"{settings.train_images - settings.validation_images}, {settings.tune_seeds} seed(s) from 100, which the "
        "comparison does not use; the lowest is taken, by method. (The paper takes the best accuracy; on so few images "
        f"and seeds the loss says more.) All begin with {', '.join(f'{lr:g}' for lr in settings.learning_rates)}, and "
        "where the best is at an edge, the next rate beyond is tried."
    )
    if edges:
        text += f" Still at an edge, so perhaps not the best there is: {', '.join(edges)}."
    return f"{text}\n\n" + _table(["", *(f"{lr:g}" for lr in tried)], rows)


def _pretraining(metrics: Mapping[str, Any]) -> str:
    looks = metrics["held_out"]
    rows = [
        ["loss", *(f"{row['loss']:.3f}" for row in looks)],
        ["accuracy, %", *(f"{100 * row['accuracy']:.1f}" for row in looks)],
        ["mean class accuracy, %", *(f"{100 * row['class_accuracy']:.1f}" for row in looks)],
    ]
    text = f"On held-out images of the {metrics['classes']} classes of the pre-training, by epoch."
    return f"{text}\n\n" + _table(["epoch", *(f"{row['epoch']:.0f}" for row in looks)], rows)


def _write_csv(file: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """One line per run."""
    plain = ["variant", "seed", "lr", "rank", "trainable_parameters", "init_seconds", "seconds"]
    looks = [(name, epoch) for epoch in settings.look_epochs for name in ("loss", "accuracy", "class_accuracy")]
    temporary = file.with_suffix(".part")
    with temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*plain, *(f"{name}_{epoch}" for name, epoch in looks)])
        for run in runs:
            values = [run.get(name) for name in plain]
            writer.writerow([*values, *(look(epoch, name)(run) for name, epoch in looks)])
    temporary.replace(file)


def _cell(interval: Interval | None, digits: int, sign: bool = False) -> str:
    if interval is None:
        return ""
    text = interval.text(digits, sign)
    return f"**{text}**" if sign and interval.excludes_zero else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
