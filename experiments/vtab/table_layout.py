"""The tables as sheets of text, whatever they are written as: columns, lines of the paper and of ours, and notes.

The paper's lines and ours stand below each other and never mix. A mean over fewer tasks than its group has says so,
``81.2 (3/7)``, and a third line then gives the paper's means over the same tasks. ``–``: no runs, or nothing printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eva_lightning.methods.registry import METHODS
from experiments.runner.statistics import Interval, Sample, mean_difference, mean_over
from experiments.runner.tables import NOTHING
from experiments.vtab.table_paper import GROUP_HEADINGS, GROUPS, HEADINGS, PaperLine, paper_lines, table25_methods
from experiments.vtab.table_results import Ours

Source = Literal["paper", "ours"]
Samples = Mapping[str, Sample]

#: Method -> what it is compared with besides the baseline.
COUNTERPARTS = {"eva-dora": "dora"}

#: Characters that are left for cells beside the labels, where 120 are shown.
_ROOM = 78

#: Columns of the sheets: tasks, then means.
TASK_COLUMNS, MEAN_COLUMNS = tuple(HEADINGS), tuple(GROUP_HEADINGS)


@dataclass(frozen=True)
class SheetLine:
    """A line of a table.

    Attributes:
        source: Whose numbers.
        label: The method, or the difference.
        cells: Column (task, group or average) -> text; what is missing is an empty cell.
        section: What the line belongs to: lines of one section stand together.
        marks: The letters of its notes.
        is_extra: It only repeats the line above over other tasks.
    """

    source: Source
    label: str
    cells: Mapping[str, str]
    section: str = ""
    marks: str = ""
    is_extra: bool = False

    def texts(self, columns: Iterable[str]) -> list[str]:
        """The text of each of `columns`."""
        return [self.cells.get(column, NOTHING) for column in columns]


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: ``"table20"``, ``"table21"``, ``"table25"``, ``"differences"``, or ``"own…"`` of other folders.
        title: One line.
        caption: What the numbers are.
        columns: Tasks, groups and ``"average"``.
        lines: Its content.
    """

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[SheetLine, ...]

    @property
    def is_own(self) -> bool:
        """Whether it is about folders that are not VTAB-1K's official draws: nothing of the paper's is in it."""
        return self.name.startswith("own")

    def blocks(self) -> dict[str, tuple[str, ...]]:
        """Columns in blocks that a screen or page is wide enough for: one per group with its mean, and the means."""
        if not set(self.columns) & set(TASK_COLUMNS):
            wide = max((len(text) for line in self.lines for text in line.cells.values()), default=0)
            fit = max(1, _ROOM // (max(wide, *map(len, map(heading, self.columns))) + 3)) if self.is_own else 99
            parts = [self.columns[i : i + fit] for i in range(0, len(self.columns), fit)]
            return {f"{i} of {len(parts)}" if len(parts) > 1 else "means": part for i, part in enumerate(parts, 1)}
        groups = MEAN_COLUMNS[:-1]
        return {**{group: (*GROUPS[group], group) for group in groups}, "means": MEAN_COLUMNS}


@dataclass(frozen=True)
class Difference:
    """One method minus another, or ours minus the paper's.

    Attributes:
        source: Whose numbers: ``"ours"`` where either side is ours.
        label: What minus what.
        section: Differences of one section stand together.
        first, second: The two sides, by task.
        notes: Why it cannot be read as a difference from published numbers.
    """

    source: Source
    label: str
    section: str
    first: Samples
    second: Samples
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks that both sides have."""
        shared = [task for task in self.first if task in self.second]
        return [*(task for task in HEADINGS if task in shared), *(task for task in shared if task not in HEADINGS)]

    def over(self, tasks: Iterable[str]) -> tuple[Interval | None, int]:
        """The mean difference over those of `tasks` that both sides have, None without any; and how many they are."""
        shared = [task for task in tasks if task in self.tasks]
        sides = ([side[task] for task in shared] for side in (self.first, self.second))
        return (mean_difference(*sides) if shared else None), len(shared)


class Notes:
    """Notes by letter, each sentence once."""

    def __init__(self, sentences: Iterable[str] = ()) -> None:
        self.sentences = list(sentences)

    def marks(self, sentences: Iterable[str]) -> str:
        """The letters of `sentences`, with commas between them."""
        known = list(sentences)
        self.sentences += [sentence for sentence in dict.fromkeys(known) if sentence not in self.sentences]
        return ",".join(letter(place) for place in sorted(self.sentences.index(sentence) for sentence in known))


def letter(index: int) -> str:
    """a, b, … z, aa, ab, …"""
    return ("" if index < 26 else letter(index // 26 - 1)) + "abcdefghijklmnopqrstuvwxyz"[index % 26]


def heading(column: str) -> str:
    """What stands above a column."""
    return HEADINGS.get(column) or GROUP_HEADINGS.get(column, column)


def tasks_of(column: str) -> tuple[str, ...]:
    """The tasks that a column is about."""
    return GROUPS.get(column, (column,))


@dataclass(frozen=True)
class Layout:
    """What one of the paper's tables shows, but for its lines."""

    number: int
    title: str
    caption: str
    columns: tuple[str, ...] = TASK_COLUMNS + MEAN_COLUMNS

    def sheet(self, ours: Sequence[Ours], notes: Notes) -> Sheet:
        """With the paper's lines and ours: of Table 21 standard deviations, of the others means."""

        def value(sample: Sample) -> float | None:
            return sample.std if self.number == 21 else sample.mean

        title = f"{self.title} (layout of Table {self.number})"
        lines = tuple(_lines(self.number, ours, notes, value))
        return Sheet(f"table{self.number}", title, self.caption, self.columns, lines)


LAYOUTS = (
    Layout(
        20,
        "Accuracy per task",
        "Accuracy on the test set in percent, mean over seeds (the paper: five). Average is the plain mean over the 19 "
        "tasks, as the paper's is; the paper's other means are taken here over its printed entries.",
    ),
    Layout(
        21,
        "Standard deviations over seeds",
        "Standard deviation of the accuracy over seeds in percent points, with n − 1 in the denominator (the paper "
        "does not say which); in the columns of means the mean of the standard deviations, as in the paper.",
    ),
    Layout(
        25,
        "Group-wise averages of the ablations",
        "Mean accuracy in percent over the tasks of each group, and over all 19 tasks. The paper prints no single "
        "tasks of its ablations, so their means cannot be taken over other tasks.",
        MEAN_COLUMNS,
    ),
)


def _lines(
    table: int, ours: Sequence[Ours], notes: Notes, value: Callable[[Sample], float | None]
) -> Iterator[SheetLine]:
    """The paper's lines in their order, ours behind that of the same method, and ours that it lacks last."""
    printed = {method: line for method, line in paper_lines().items() if table in line.averages}
    # of methods that the ablations' table lacks, that of the components of least variance belongs there
    others = [method for method in METHODS if table != 25 or METHODS[method].state_kind == "minor"]
    for method in dict.fromkeys([*(table25_methods() if table == 25 else printed), *others]):
        line = printed.get(method)
        if line is not None:
            cells = {} if table == 25 else _cells(line.samples, value)
            cells |= {group: f"{mean:.1f}" for group, mean in line.averages[table].items()}
            yield SheetLine("paper", METHODS[method].label, cells, method)
        for entry in (e for e in ours if e.key.method == method and not HEADINGS.keys().isdisjoint(e.samples)):
            yield SheetLine("ours", entry.label, _cells(entry.samples, value), method, notes.marks(entry.notes))
            if entry.rhos and table == 20:
                cells = {task: f"{entry.rhos[task]:g}" for task in entry.samples if task in HEADINGS}
                yield SheetLine("ours", f"{entry.label}: ρ chosen", cells, method, is_extra=True)
            if line is not None and not set(line.samples) <= set(entry.samples):
                yield _same_tasks(entry, line, value)


def _same_tasks(entry: Ours, line: PaperLine, value: Callable[[Sample], float | None]) -> SheetLine:
    """The paper's means over the tasks that `entry` has, where these are not all and the paper prints them."""
    cells = _cells({task: sample for task, sample in line.samples.items() if task in entry.samples}, value)
    means = {group: text for group, text in cells.items() if group in GROUPS}
    label = f"{METHODS[line.method].label}, same tasks"
    return SheetLine("paper", label, means, line.method, is_extra=True)


def _cells(samples: Samples, value: Callable[[Sample], float | None]) -> dict[str, str]:
    """Text of every task there is a value of, and of the means over those; a mean over fewer says over how many."""
    values = {task: found for task, sample in samples.items() if (found := value(sample)) is not None}
    cells = {}
    for column in TASK_COLUMNS + MEAN_COLUMNS:
        known = [values[task] for task in tasks_of(column) if task in values]
        if known:
            cells[column] = f"{statistics.fmean(known):.1f}{_share(len(known), column)}"
    return cells


def mean_cells(samples: Samples) -> dict[str, str]:
    """Text of the mean accuracies over groups of tasks."""
    return {column: text for column, text in _cells(samples, lambda sample: sample.mean).items() if column in GROUPS}


def _share(known: int, column: str) -> str:
    whole = len(tasks_of(column))
    return "" if known == whole else f" ({known}/{whole})"


def differences(ours: Sequence[Ours], baseline: str) -> list[Difference]:
    """Ours minus the paper's by method; then between methods, with the paper's same difference above ours."""
    printed = {method: line.samples for method, line in paper_lines().items() if line.samples}
    found = [
        Difference("ours", f"{a.label}: ours − paper", "", a.samples, printed[a.key.method], a.notes)
        for a in ours
        if a.key.method in printed
    ]
    pairs = [(m, b) for m in METHODS for b in (baseline, COUNTERPARTS.get(m)) if b is not None and m != b]
    for first, second in pairs:
        label = f"{METHODS[first].label} − {METHODS[second].label}"
        # methods are compared within an experiment only
        mine = [
            Difference(
                "ours", f"{a.label} − {b.label}", label, a.samples, b.samples, tuple(dict.fromkeys(a.notes + b.notes))
            )
            for a in ours
            for b in ours
            if a.experiment == b.experiment and (a.key.method, b.key.method) == (first, second)
        ]
        if mine and first in printed and second in printed:
            found.append(Difference("paper", label, label, printed[first], printed[second]))
        found += mine
    return found


def differences_sheet(found: Sequence[Difference], notes: Notes) -> Sheet:
    """The differences with their intervals, per task and in the mean."""
    columns = TASK_COLUMNS + MEAN_COLUMNS
    lines = []
    for difference in found:
        cells = {}
        for column in columns:
            interval, shared = difference.over(tasks_of(column))
            if interval is not None:
                cells[column] = difference_text(interval) + _share(shared, column)
        if not cells:  # its sides share no task, or other folders alone
            continue
        marks = notes.marks(difference.notes)
        lines.append(SheetLine(difference.source, difference.label, cells, difference.section, marks))
    caption = (
        "Differences of mean accuracies in percent points, with 95% intervals: d ± t(ν)√V, where for T tasks (1 for "
        "a single one) V = Σ(s²/n)/T² over both sides' standard deviations s and numbers of seeds n of every task, and "
        "ν are the Welch-Satterthwaite degrees of freedom. The paper's side takes s from Table 21 and n = 5, and the "
        "variance 0.1²/12 of rounding is added. Seeds are the random part, independent between the two sides; tasks "
        "are fixed: an interval is one for these tasks with new seeds. *: the interval excludes 0, as 1 in 20 does by "
        "chance; without ±: fewer than two seeds."
    )
    return Sheet("differences", "Differences with intervals", caption, columns, tuple(lines))


def difference_text(interval: Interval) -> str:
    """A difference with its interval, and a star where that excludes 0."""
    text = interval.text(1, sign=True).replace("-", "−").replace("−0.0", "+0.0", 1)
    return f"{text}*" if interval.excludes_zero else text


def mean_interval(samples: Samples, tasks: Iterable[str]) -> tuple[Interval | None, int]:
    """The mean over those of `tasks` that there are, with its interval over seeds, and how many they are."""
    known = [samples[task] for task in tasks if task in samples]
    return (mean_over(known) if known else None), len(known)
