"""Methods against the baseline on these folders: paired differences with corrected p-values, and ranks over folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from experiments.runner.statistics import Interval, Range, holm, mean_ranks, paired_values, t_test
from experiments.vtab.own_results import OwnResults
from experiments.vtab.table_results import Ours


@dataclass(frozen=True)
class Cell:
    """A method minus the baseline on one column.

    Attributes:
        interval: Of the difference in percent points, over seeds.
        p: Of a paired t test; None for a single seed, and for a mean over some of its folders.
        corrected: The same by Holm's procedure over its family.
        folders: How many folders it is over.
    """

    interval: Interval
    p: float | None
    corrected: float | None
    folders: int

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.corrected is not None and self.corrected < 0.05


Pairs = dict[tuple[str, str], Cell]
"""(label of a method, column) -> what it is minus the baseline."""


def paired_cells(results: OwnResults) -> Pairs:
    """Differences run by run: both runs of a pair have the same seed, and so the same images in the same order.

    The single folders are one family of tests, all methods together; every column of means is one of its own, of the
    methods that have all its folders.
    """
    found = {}
    for entry in results.entries:
        reference = results.reference(entry)
        if reference is None:
            continue
        both = pd.concat([entry.runs.assign(method="first"), reference.runs.assign(method="second")])
        for column, folders in results.columns.items():
            shared = [folder for folder in folders if folder in entry.samples and folder in reference.samples]
            values = paired_values(both[both["task"].isin(shared)], "first", "second", "accuracy") if shared else []
            if values:
                p = t_test(values) if len(shared) == len(folders) else None
                found[entry.label, column] = (Interval.of(values), p, len(shared))
    corrected = _corrected({key: p for key, (_, p, _) in found.items() if p is not None}, results)
    return {key: Cell(interval, p, corrected.get(key), n) for key, (interval, p, n) in found.items()}


def _corrected(p_values: dict[tuple[str, str], float], results: OwnResults) -> dict[tuple[str, str], float]:
    families: dict[str, dict[tuple[str, str], float]] = {}
    for (label, column), p in p_values.items():
        single = len(results.columns[column]) == 1
        families.setdefault("folders" if single else column, {})[label, column] = p
    return {key: p for family in families.values() for key, p in holm(family).items()}


def rank_columns(results: OwnResults) -> dict[str, dict[str, Range]]:
    """Heading -> label of a method -> its mean rank, over as many folders as some set of methods shares.

    Where some methods were run on more folders than others, there is a column for the folders that all have, and
    one for more folders with fewer methods.
    """
    columns: dict[str, dict[str, Range]] = {}
    for experiment in dict.fromkeys(entry.experiment for entry in results.entries):
        entries = [entry for entry in results.entries if entry.experiment == experiment]
        for folders, shared in _blocks(entries, results.folders):
            values = {
                entry.label: [entry.runs.loc[entry.runs["task"] == folder, "accuracy"].tolist() for folder in folders]
                for entry in shared
            }
            heading = f"{len(shared)} methods, {len(folders)} folders ({', '.join(folders)})"
            columns[heading] = mean_ranks(values)
    return columns


def _blocks(entries: Sequence[Ours], folders: Sequence[str]) -> list[tuple[list[str], list[Ours]]]:
    """Sets of two folders or more with two methods or more that all of them have; larger sets of methods first."""
    counts = {folder: sum(folder in entry.samples for entry in entries) for folder in folders}
    ordered = sorted(folders, key=lambda folder: -counts[folder])
    found: dict[tuple[str, ...], tuple[list[str], list[Ours]]] = {}
    for size in range(2, len(ordered) + 1):
        chosen = [folder for folder in folders if folder in ordered[:size]]
        shared = [entry for entry in entries if set(chosen) <= set(entry.samples)]
        if len(shared) > 1:
            found[tuple(entry.label for entry in shared)] = (chosen, shared)  # the largest set of folders stays
    return list(found.values())
