"""The tables as sheets of text, whatever they are written as: columns, lines of the paper and of ours, and notes.

The paper's lines and ours stand below each other and never mix. A mean over fewer tasks than its group has says so,
``81.2 (3/7)``, and a third line then gives the paper's means over the same tasks. ``–``: no runs, or nothing printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eva_lightning.methods.keys import METHOD_TRAITS
from experiments.runner.statistics import Interval, Sample, mean_difference, mean_over
from experiments.vtab.table_paper import GROUP_HEADINGS, GROUPS, HEADINGS, PaperLine, paper_lines, table25_methods
from experiments.vtab.table_results import Ours

NOTHING = "–"

Source = Literal["paper", "ours"]
Samples = Mapping[str, Sample]

#: Method -> what it is compared with besides the baseline.
COUNTERPARTS = {"eva-dora": "dora"}


@dataclass(frozen=True)
class Column:
    """A column: a task, or the mean over a group (`is_mean`)."""

    key: str
    heading: str
    group: str
    is_mean: bool = False


@dataclass(frozen=True)
class SheetLine:
    """A line of a table.

    Attributes:
        source: Whose numbers.
        label: The method, or the difference.
        cells: Column -> text.
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


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        name: ``"table20"``, ``"table21"``, ``"table25"`` or ``"differences"``.
        title: One line.
        caption: What the numbers are.
        columns, lines: Its content.
    """

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    lines: tuple[SheetLine, ...]

    def block(self, group: str | None) -> tuple[Column, ...]:
        """The columns of one group with its mean; for None the means alone."""
        if group is None:
            return tuple(column for column in self.columns if column.is_mean)
        return tuple(column for column in self.columns if column.group == group)

    @property
    def has_tasks(self) -> bool:
        """Whether there are columns besides the means."""
        return any(not column.is_mean for column in self.columns)


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
        return [task for task in HEADINGS if task in self.first and task in self.second]

    def over(self, tasks: Iterable[str]) -> Interval | None:
        """The mean difference over those of `tasks` that both sides have; None where there is none."""
        shared = [task for task in tasks if task in self.tasks]
        return mean_difference(*([s[t] for t in shared] for s in (self.first, self.second))) if shared else None


class Notes:
    """Notes by letter, each sentence once."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def marks(self, sentences: Iterable[str]) -> str:
        """The letters of `sentences`, with commas between them."""
        found = []
        for sentence in sentences:
            if sentence not in self.sentences:
                self.sentences.append(sentence)
            found.append(letter(self.sentences.index(sentence)))
        return ",".join(sorted(found, key=lambda mark: (len(mark), mark)))


def letter(index: int) -> str:
    """a, b, … z, aa, ab, …"""
    return ("" if index < 26 else letter(index // 26 - 1)) + "abcdefghijklmnopqrstuvwxyz"[index % 26]


def table20(ours: Sequence[Ours], notes: Notes) -> Sheet:
    """Accuracy per task, and means."""

    def paper(line: PaperLine) -> dict[str, str]:
        cells = _cells(line.samples, lambda sample: sample.mean)
        return cells | ({} if line.average is None else {"average": f"{line.average:.1f}"})

    caption = (
        "Accuracy on the test set in percent, mean over seeds (the paper: five). Average is the plain mean over the 19 "
        "tasks, as the paper's is; the paper's other means are taken here over its printed entries."
    )
    lines = _lines(ours, notes, paper, lambda samples: _cells(samples, lambda sample: sample.mean))
    return Sheet("table20", "Accuracy per task (layout of Table 20)", caption, _columns(), tuple(lines))


def table21(ours: Sequence[Ours], notes: Notes) -> Sheet:
    """Standard deviations over seeds; their means in the columns of means, as the paper does it."""

    def paper(line: PaperLine) -> dict[str, str]:
        cells = _cells(line.samples, lambda sample: sample.std)
        return cells | ({} if line.average_std is None else {"average": f"{line.average_std:.1f}"})

    caption = (
        "Standard deviation of the accuracy over seeds in percent points, with n − 1 in the denominator (the paper "
        "does not say which); in the columns of means the mean of the standard deviations, as in the paper."
    )
    lines = _lines(ours, notes, paper, lambda samples: _cells(samples, lambda sample: sample.std))
    return Sheet("table21", "Standard deviations over seeds (layout of Table 21)", caption, _columns(), tuple(lines))


def table25(ours: Sequence[Ours], notes: Notes) -> Sheet:
    """Group-wise averages of the ablations."""
    columns = tuple(column for column in _columns() if column.is_mean)
    methods = table25_methods()
    lines: list[SheetLine] = []
    for method in (*methods, *(m for m in METHOD_TRAITS if m.startswith("eva-mi"))):
        printed = next((line for line in paper_lines() if line.method == method), None)
        if printed is not None:
            cells = {group: f"{value:.1f}" for group, value in printed.groups.items()}
            lines.append(_line("paper", METHOD_TRAITS[method].label, cells, columns, method))
        for entry in (entry for entry in ours if entry.key.method == method):
            cells = _cells(entry.samples, lambda sample: sample.mean)
            lines.append(_own_line(entry, cells, columns, notes))
            lines += _same_tasks(entry, printed, columns)
    caption = (
        "Mean accuracy in percent over the tasks of each group, and over all 19 tasks. The paper prints no single "
        "tasks of its ablations, so their means cannot be taken over other tasks."
    )
    return Sheet("table25", "Group-wise averages of the ablations (layout of Table 25)", caption, columns, tuple(lines))


def differences(ours: Sequence[Ours], baseline: str) -> list[Difference]:
    """Ours minus the paper's by method; then between methods, with the paper's same difference above ours."""
    printed = {line.method: line for line in paper_lines() if line.samples}
    found = []
    for entry in ours:
        if entry.key.method in printed:
            theirs = printed[entry.key.method].samples
            found.append(Difference("ours", f"{entry.label}: ours − paper", "", entry.samples, theirs, entry.notes))
    pairs = [(m, b) for m in METHOD_TRAITS for b in (baseline, COUNTERPARTS.get(m)) if b is not None and m != b]
    for method, other in pairs:
        mine = [(a, b) for a in ours for b in ours if _comparable(a, b, method, other)]
        label = f"{METHOD_TRAITS[method].label} − {METHOD_TRAITS[other].label}"
        if mine and method in printed and other in printed:
            found.append(Difference("paper", label, label, printed[method].samples, printed[other].samples))
        found += [
            Difference("ours", f"{a.label} − {b.label}", label, a.samples, b.samples,
                       tuple(dict.fromkeys([*a.notes, *b.notes])))
            for a, b in mine
        ]  # fmt: skip
    return found


def differences_sheet(found: Sequence[Difference], notes: Notes) -> Sheet:
    """The differences with their intervals, per task and in the mean."""
    lines = []
    for difference in found:
        cells = {}
        for column in _columns():
            tasks = GROUPS[column.key] if column.is_mean else (column.key,)
            interval = difference.over(tasks)
            if interval is not None:
                shared = sum(task in difference.tasks for task in tasks)
                cells[column.key] = _difference_text(interval) + _share(shared, len(tasks))
        marks = notes.marks(difference.notes)
        lines.append(_line(difference.source, difference.label, cells, _columns(), difference.section, marks))
    caption = (
        "Differences of mean accuracies in percent points, with 95% intervals: d ± t(ν)√V, where for T tasks (1 for "
        "a single one) V = Σ(s²/n)/T² over both sides' standard deviations s and numbers of seeds n of every task, and "
        "ν are the Welch-Satterthwaite degrees of freedom. The paper's side takes s from Table 21 and n = 5, and the "
        "variance 0.1²/12 of rounding is added. Seeds are the random part, independent between the two sides; tasks "
        "are fixed: an interval is one for these tasks with new seeds. *: the interval excludes 0, as 1 in 20 does by "
        "chance; without ±: fewer than two seeds."
    )
    return Sheet("differences", "Differences with intervals", caption, _columns(), tuple(lines))


def _columns() -> tuple[Column, ...]:
    tasks = [Column(task, heading, _group(task)) for task, heading in HEADINGS.items()]
    return (*tasks, *(Column(group, heading, group, True) for group, heading in GROUP_HEADINGS.items()))


def _group(task: str) -> str:
    return next(group for group, tasks in GROUPS.items() if task in tasks)


def _lines(
    ours: Sequence[Ours],
    notes: Notes,
    paper: Callable[[PaperLine], Mapping[str, str]],
    own: Callable[[Samples], Mapping[str, str]],
) -> list[SheetLine]:
    """The paper's lines in their order, ours behind that of the same method, and ours that it lacks last."""
    columns = _columns()
    printed = [line for line in paper_lines() if line.samples]
    lines = []
    for line in printed:
        lines.append(_line("paper", METHOD_TRAITS[line.method].label, paper(line), columns, line.method))
        for entry in (entry for entry in ours if entry.key.method == line.method):
            lines.append(_own_line(entry, own(entry.samples), columns, notes))
            lines += _same_tasks(entry, line, columns, own)
    known = {line.method for line in printed}
    for entry in (entry for entry in ours if entry.key.method not in known):
        lines.append(_own_line(entry, own(entry.samples), columns, notes))
    return lines


def _same_tasks(
    entry: Ours,
    printed: PaperLine | None,
    columns: Sequence[Column],
    own: Callable[[Samples], Mapping[str, str]] = lambda samples: _cells(samples, lambda sample: sample.mean),
) -> list[SheetLine]:
    """The paper's means over the tasks that `entry` has, where these are not all and the paper prints them."""
    if printed is None or not printed.samples or all(task in entry.samples for task in HEADINGS):
        return []
    shared = {task: sample for task, sample in printed.samples.items() if task in entry.samples}
    cells = {key: text for key, text in own(shared).items() if key in GROUPS}
    line = _line("paper", f"{METHOD_TRAITS[printed.method].label}, same tasks", cells, columns, printed.method)
    return [replace(line, is_extra=True)]


def _own_line(entry: Ours, cells: Mapping[str, str], columns: Sequence[Column], notes: Notes) -> SheetLine:
    return _line("ours", entry.label, cells, columns, entry.key.method, notes.marks(entry.notes))


def _line(
    source: Source, label: str, cells: Mapping[str, str], columns: Sequence[Column], section: str, marks: str = ""
) -> SheetLine:
    return SheetLine(source, label, {column.key: cells.get(column.key, NOTHING) for column in columns}, section, marks)


def _cells(samples: Samples, value: Callable[[Sample], float | None]) -> dict[str, str]:
    """Text of every task there is a value of, and of the means over those; a mean over fewer says over how many."""
    values = {task: found for task, sample in samples.items() if (found := value(sample)) is not None}
    cells = {task: f"{number:.1f}" for task, number in values.items()}
    for group, tasks in GROUPS.items():
        known = [values[task] for task in tasks if task in values]
        if known:
            cells[group] = f"{statistics.fmean(known):.1f}{_share(len(known), len(tasks))}"
    return cells


def _share(known: int, whole: int) -> str:
    return "" if known == whole else f" ({known}/{whole})"


def _difference_text(interval: Interval) -> str:
    text = interval.text(1, sign=True).replace("-", "−").replace("−0.0", "+0.0", 1)
    return f"{text}*" if interval.excludes_zero else text


def _comparable(first: Ours, second: Ours, method: str, other: str) -> bool:
    same = first.experiment == second.experiment
    return same and (first.key.method, second.key.method) == (method, other)


def mean_interval(samples: Samples, tasks: Iterable[str]) -> tuple[Interval | None, int]:
    """The mean over those of `tasks` that there are, with its interval over seeds, and how many they are."""
    known = [samples[task] for task in tasks if task in samples]
    return (mean_over(known) if known else None), len(known)
