"""Some test images with what was predicted before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eva_lightning.vision.data.split_files import Split
from eva_lightning.vision.data.splits import TaskData
from experiments.report.page import Figure, photograph

#: How many are shown of those on which the prediction changed, and of the others.
SHOWN = 6


@dataclass(frozen=True)
class Samples:
    """What a page shows.

    Attributes:
        figures: The images, each with the predictions below it.
        sentence: Which they are, and how many of all changed.
    """

    figures: tuple[Figure, ...]
    sentence: str


def samples(data: TaskData, before: Sequence[int], after: Sequence[int], names: tuple[str, str]) -> Samples:
    """The first images whose prediction changed, and the first of the others.

    Args:
        data: The test images are those it evaluates on.
        before, after: Labels that were predicted for them, one each.
        names: Who predicted them.
    """
    split, classes = data.evaluation, data.class_names
    counts = {"corrected": 0, "spoiled": 0}
    changed: list[int] = []
    same: list[int] = []
    for place, (label, first, last) in enumerate(zip(split.labels, before, after, strict=True)):
        (same if first == last else changed).append(place)
        counts["corrected"] += first != label == last
        counts["spoiled"] += first == label != last
    chosen = [*changed[:SHOWN], *same[:SHOWN]]
    figures = tuple(
        _figure(split, place, [classes[i] for i in (split.labels[place], before[place], after[place])], names)
        for place in chosen
    )
    return Samples(
        figures,
        f"Before: {names[0]}; after: {names[1]}, seed 0. Of {len(split)} test images {counts['corrected']} were wrong "
        f"before and are right after, {counts['spoiled']} the other way round. Shown are, in the order of the test "
        f"set, the first {min(SHOWN, len(changed))} on which the two differ and the first {min(SHOWN, len(same))} "
        "others.",
    )


def _figure(split: Split, place: int, said: Sequence[str], names: tuple[str, str]) -> Figure:
    truth, before, after = said
    marks = ["✓" if name == truth else "✗" for name in (before, after)]
    alt = f"Photograph of {truth}; {names[0]}: {before}; {names[1]}: {after}"
    return photograph(
        split.folder / split.paths[place], alt, f"{truth}\n{marks[0]} before: {before}\n{marks[1]} after: {after}"
    )
