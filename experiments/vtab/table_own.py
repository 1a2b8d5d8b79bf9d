"""Results on folders that are none of VTAB-1K's tasks, in a table of their own: never beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.vtab.table_layout import (
    Difference,
    Notes,
    Sheet,
    SheetLine,
    difference_text,
    mean_interval,
)
from experiments.vtab.table_paper import HEADINGS
from experiments.vtab.table_results import Ours

_MEAN = "mean"
_CAPTION = (
    "Accuracy in percent on the test images of folders that are none of VTAB-1K's tasks, mean over seeds ± half a 95% "
    "interval (Student's t), and below it differences with theirs (Welch), as in the table of differences. Folders are "
    "fixed: an interval is one for these folders with new seeds."
)


def own_folders(ours: Sequence[Ours]) -> tuple[str, ...]:
    """The folders that there are results of."""
    return tuple(dict.fromkeys(task for entry in ours for task in entry.samples if task not in HEADINGS))


def own_sheet(ours: Sequence[Ours], differences: Sequence[Difference], notes: Notes) -> Sheet:
    """A line per method and ρ, then a line per difference."""
    folders = own_folders(ours)
    groups = {**{folder: (folder,) for folder in folders}, **({_MEAN: folders} if len(folders) > 1 else {})}
    lines = []
    for entry in ours:
        found = {column: mean_interval(entry.samples, tasks) for column, tasks in groups.items()}
        cells = {
            column: interval.text(1) + _share(known, groups[column])
            for column, (interval, known) in found.items()
            if interval is not None
        }
        if cells:
            lines.append(SheetLine("ours", entry.label, cells, entry.key.method, notes.marks(entry.notes)))
        if cells and entry.rhos:
            rhos = {folder: f"{entry.rhos[folder]:g}" for folder in folders if folder in entry.rhos}
            lines.append(SheetLine("ours", f"{entry.label}: ρ chosen", rhos, entry.key.method, is_extra=True))
    for difference in differences:
        over = {column: difference.over(tasks) for column, tasks in groups.items()}
        cells = {
            column: difference_text(interval) + _share(known, groups[column])
            for column, (interval, known) in over.items()
            if interval is not None
        }
        if cells:
            lines.append(SheetLine("ours", difference.label, cells, "differences", notes.marks(difference.notes)))
    return Sheet("own", "Accuracy on other folders", _CAPTION, tuple(groups), tuple(lines))


def _share(known: int, tasks: Sequence[str]) -> str:
    return "" if known == len(tasks) else f" ({known}/{len(tasks)})"
