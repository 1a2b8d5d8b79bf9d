"""Results on folders that are not VTAB-1K's official draws: which folders and methods, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from eva_lightning.errors import InputError, check_choice
from eva_lightning.methods.registry import DEFAULT_RHO, MethodKey
from eva_lightning.vision.data.tasks import TASKS
from experiments.vtab.table_paper import GROUP_HEADINGS, HEADINGS
from experiments.vtab.table_results import Ours, gather

#: Behind the name of every folder in a table.
MARK = "°"

MEAN = "mean"
_GROUPS = tuple(group for group in GROUP_HEADINGS if group != "average")


@dataclass(frozen=True)
class OwnResults:
    """What there is of these folders.

    Attributes:
        entries: One per method and ρ, in the order of reports, with the runs that count.
        runs: All runs on these folders, also those of tuning.
        groups: Folder -> natural, specialized or structured, where that is known.
        baseline: The method that the others are compared with.
        about: What weights and data are, as the user has it.
    """

    entries: tuple[Ours, ...]
    runs: pd.DataFrame
    groups: Mapping[str, str]
    baseline: str
    about: str = ""

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """Folders with final runs: those named like VTAB-1K's tasks in its order, then the others by name."""
        found = {task for entry in self.entries for task in entry.samples}
        return (*(task for task in HEADINGS if task in found), *sorted(found - HEADINGS.keys()))

    @cached_property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Heading -> folders: each alone, then groups of at least two, then all."""
        columns: dict[str, tuple[str, ...]] = {f"{folder}{MARK}": (folder,) for folder in self.folders}
        grouped = {group: tuple(f for f in self.folders if self.groups.get(f) == group) for group in _GROUPS}
        columns |= {
            f"{group}, mean": members for group, members in grouped.items() if 1 < len(members) < len(self.folders)
        }
        return columns | ({MEAN: self.folders} if len(self.folders) > 1 else {})

    def reference(self, entry: Ours) -> Ours | None:
        """The baseline of the entry's experiment; None for itself."""
        same = (e for e in self.entries if (e.experiment, e.key.key) == (entry.experiment, self.baseline))
        found = next(same, None)
        return None if found is entry else found

    @property
    def setup(self) -> str:
        """Sentences for captions: what the columns are, the model, the weights, and how long was trained."""
        finals = self.runs[self.runs["phase"] == "final"]
        models = " or ".join(finals["model"].unique())
        weights = " or ".join(dict.fromkeys(map(_weights, finals["weights"])))
        sizes, epochs = (
            " or ".join(str(value) for value in sorted(finals[name].dropna().unique()))
            for name in ("image_size", "epochs")
        )
        sentence = (
            f"{MARK}: a folder that is not the official VTAB-1K draw of any task, or only a part of one. "
            f"{models}, {weights}, {sizes} px, {epochs} epochs."
        )
        return f"{sentence} {self.about.rstrip('.')}." if self.about else sentence


def full_label(key: str) -> str:
    """A method as these tables call it: with its ρ, also where that is 2."""
    method = MethodKey.parse(key)
    return method.label + (f" (ρ = {method.rho:g})" if method.rho == DEFAULT_RHO else "")


def own_folders(runs: pd.DataFrame) -> tuple[str, ...]:
    """The folders with final runs that are none of VTAB-1K's tasks, or have not the official numbers of images."""
    final = runs[runs["phase"] == "final"]
    return tuple(task for task, found in final.groupby("task") if task not in HEADINGS or not found["official"].all())


def own_results(
    runs: pd.DataFrame, baseline: str = "lora", groups: Iterable[str] = (), each_rho: bool = False, about: str = ""
) -> OwnResults | None:
    """The results on these folders among `runs`; None without any.

    A method whose ρ was searched has one entry of the chosen ρ, or, where every ρ has final runs on all its folders,
    one of each ρ instead.

    Args:
        runs: As :func:`~experiments.vtab.table_results.read_runs` gives them.
        baseline: The method to compare with.
        groups: ``folder=group``, for folders that are not named like a task of VTAB-1K.
        each_rho: Entries of every ρ besides in any case.
        about: What weights and data are.

    Raises:
        InputError: A group is unknown, or no ``folder=group``.
    """
    of_folders = parse_groups(groups)
    own = runs[runs["task"].isin(own_folders(runs))]
    if own.empty:
        return None
    known = {str(task): TASKS[str(task)].group for task in own["task"].unique() if task in TASKS}
    entries = gather(own, each_rho=True)
    kept = entries if each_rho else [entry for entry in entries if _counts(entry, entries)]
    kept = [replace(entry, names_rho=not entry.rhos) for entry in kept]
    return OwnResults(tuple(kept), own, {**known, **of_folders}, baseline, about)


def parse_groups(words: Iterable[str]) -> dict[str, str]:
    """Folder -> group, from ``folder=group``.

    Raises:
        InputError: A group is unknown, or no ``folder=group``.
    """
    found = {}
    for word in words:
        folder, equals, group = word.rpartition("=")
        if not equals or not folder:
            raise InputError(f"groups takes folder=group with commas between, got {word!r}", setting="groups")
        check_choice("group", group, _GROUPS)
        found[folder] = group
    return found


def _counts(entry: Ours, entries: Sequence[Ours]) -> bool:
    """Whether an entry is shown: that of a chosen ρ, or those of each."""
    same = [e for e in entries if (e.key.method, e.experiment) == (entry.key.method, entry.experiment)]
    chosen = [e for e in same if e.rhos]
    if not chosen:
        return True
    each = [e for e in same if not e.rhos]
    complete = len(each) > 1 and all(set(e.samples) == set(chosen[0].samples) for e in each)
    return bool(entry.rhos) != complete


def _weights(identity: object) -> str:
    if identity in (None, "pretrained"):
        return "pre-trained weights of the hub"
    if identity == "none":
        return "random weights"
    return f"weights of the file {str(identity).split(':')[0].rsplit('/', 1)[-1]} (not fetched from the hub)"
