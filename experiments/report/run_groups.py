"""Runs that differ in nothing but their seeds, as rows of a table; differences to a baseline; what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eva_lightning.methods import METHODS
from experiments.report.epochs import verdict
from experiments.report.found_runs import FoundRun
from experiments.report.page import Table, counted
from experiments.runner.statistics import PLUS_MINUS, Interval
from experiments.runner.tables import NOTHING
from experiments.vtab.settings import weights_in_words

BASELINE = "lora"


@dataclass(frozen=True)
class Measure:
    """A column of results.

    Attributes:
        name: In :attr:`FoundRun.values`.
        title: Above the column.
        digits: Behind the point.
        sign: 1 where higher is better, -1 where lower is; 0 where neither is.
    """

    name: str
    title: str
    digits: int
    sign: int = 0


#: The first that a task's runs have is what methods are compared by.
MEASURES = (
    Measure("accuracy", "Accuracy (%)", 1, 1),
    Measure("val_loss", "Validation loss", 4, -1),
    Measure("loss", "Loss (nats)", 3, -1),
    Measure("success_rate", "Success, any step", 2, 1),
    Measure("final_success_rate", "Success, last step", 2, 1),
    Measure("mean_return", "Return", 0, 1),
    Measure("trainable_parameters", "Trained", 0),
    Measure("train_seconds", "Training (s)", 1),
)


@dataclass(frozen=True)
class Group:
    """Runs of one task that differ in nothing but their seeds.

    Attributes:
        label: The method, as reports print it.
        method: Its key.
        differing: The settings in which runs of the task differ -> their values here, in words.
        runs: At least one, in the order of seeds.
    """

    label: str
    method: str
    differing: Mapping[str, str]
    runs: tuple[FoundRun, ...]

    @property
    def name(self) -> str:
        """The method with what tells it from others of it."""
        more = ", ".join(f"{name} {value}" for name, value in self.differing.items() if value != NOTHING)
        return f"{self.label}, {more}" if more else self.label

    @property
    def whole(self) -> list[FoundRun]:
        """The runs that have not diverged."""
        return [run for run in self.runs if not run.has_diverged]

    def by_seed(self, measure: str) -> dict[int, float]:
        """Its finite values."""
        values = {run.seed: run.values.get(measure, math.nan) for run in self.whole}
        return {seed: value for seed, value in values.items() if math.isfinite(value)}

    def interval(self, measure: str) -> Interval | None:
        """Over seeds; None where no run has the measure."""
        values = self.by_seed(measure)
        return Interval.of(list(values.values())) if values else None


@dataclass(frozen=True)
class OfTask:
    """The runs of a task that can be compared: all are judged on the same part of its images.

    Attributes:
        task: Its name, with that part where runs of the task are judged on several.
        groups: In the order of the method registry.
        common: Settings in which all runs agree.
        repeated: Folders of runs that others repeat: same method, settings and seed.
    """

    task: str
    groups: tuple[Group, ...]
    common: Mapping[str, Any]
    repeated: tuple[str, ...]

    @property
    def measures(self) -> list[Measure]:
        """Those that any run has; the first one compares."""
        return [each for each in MEASURES if any(each.name in run.values for run in self.runs)]

    @property
    def runs(self) -> list[FoundRun]:
        """All that count."""
        return [run for group in self.groups for run in group.runs]

    @property
    def judged_on(self) -> str:
        """The part of the images, the same for all; empty where no run names it."""
        return self.runs[0].judged_on

    @property
    def weights(self) -> str:
        """What the weights are, in words; empty where no setting says so."""
        given = dict.fromkeys(run.weights for run in self.runs if run.weights)
        return "; ".join(dict.fromkeys(weights_in_words(each).removeprefix("weights of ") for each in given))


def by_task(runs: Sequence[FoundRun]) -> list[OfTask]:
    """The runs of every task: those of images apart from those of robots, should both have one of a name, and those
    judged on the test images before those of a tuning, which are judged on others."""
    tasks: dict[tuple[bool, str], dict[str, list[FoundRun]]] = {}
    for run in runs:
        tasks.setdefault((run.is_of_images, run.task), {}).setdefault(run.judged_on, []).append(run)
    return [
        _of_task(f"{task}, on {part or 'a part not named'}" if len(parts) > 1 else task, parts[part])
        for (_, task), parts in tasks.items()
        for part in sorted(parts, key=lambda part: part != "test")
    ]


def _of_task(task: str, runs: Sequence[FoundRun]) -> OfTask:
    names = dict.fromkeys(name for run in runs for name in run.settings if not _is_seed(name, runs))
    # a setting that a command lacks tells nothing apart, one that is given in some runs only does
    values = {name: {_text(run.settings[name]) for run in runs if name in run.settings} for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    common = {name: next(iter(values[name])) for name in names if len(values[name]) == 1}
    common = {name: value for name, value in common.items() if value != NOTHING}
    groups: dict[tuple[str, ...], dict[int, FoundRun]] = {}
    repeated = []
    for run in runs:
        key = (run.method, *(_text(run.settings.get(name)) for name in differing))
        seeds = groups.setdefault(key, {})
        if run.seed in seeds:
            repeated.append(f"{run.folder} repeats {seeds[run.seed].folder} (same method, settings and seed)")
        seeds.setdefault(run.seed, run)
    found = [
        Group(next(iter(seeds.values())).label, key[0], dict(zip(differing, key[1:], strict=True)),
              tuple(seeds[seed] for seed in sorted(seeds)))
        for key, seeds in groups.items()
    ]  # fmt: skip
    return OfTask(task, tuple(sorted(found, key=_place)), common, tuple(repeated))


def _is_seed(name: str, runs: Iterable[FoundRun]) -> bool:
    """Whether a setting is another name of the seed, as that of evaluation goals may be."""
    return name.endswith("seed") and all(run.settings.get(name, run.seed) == run.seed for run in runs)


def _text(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return NOTHING
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _place(group: Group) -> tuple[Any, ...]:
    order = list(METHODS)
    name, _, rho = group.method.partition(":")
    place = order.index(name) if name in order else -1
    return (place, group.label, rho, tuple(_as_number(value) for value in group.differing.values()))


def _as_number(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """LoRA with the same settings, else the only LoRA that there is; None for LoRA itself."""
    if group.method == BASELINE:
        return None
    known = [each for each in groups if each.method == BASELINE]
    same = [each for each in known if each.differing == group.differing]
    return same[0] if same else known[0] if len(known) == 1 else None


def difference(group: Group, baseline: Group, measure: Measure) -> Interval | None:
    """Over the seeds that both have; None where they share none."""
    ours, theirs = group.by_seed(measure.name), baseline.by_seed(measure.name)
    values = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Interval.of(values) if values else None


def results_table(of_task: OfTask) -> Table:
    """A row per group; the best mean of every measure with an asterisk."""
    groups, measures = of_task.groups, of_task.measures
    best = {each.name: _best(groups, each) for each in measures if each.sign}
    rows = [
        {
            **group.differing,
            "Seeds": _seeds(group),
            **{each.title: _cell(group, each, best.get(each.name)) for each in measures},
            **_against(group, groups, measures[0]),
        }
        for group in groups
    ]
    index = pd.Index([group.label for group in groups], name="Method")
    cells = pd.DataFrame(rows, index=index).fillna(NOTHING)
    notes = [PLUS_MINUS, "*: the best mean of the column, which says nothing about significance."]
    notes += ["minus LoRA: over the seeds that both have, with LoRA's run of the same settings, or its only one."] * (
        f"{measures[0].title} minus LoRA" in cells
    )
    return Table(f"{of_task.task}: what came out", cells, tuple(notes))


def _against(group: Group, groups: Sequence[Group], measure: Measure) -> dict[str, str]:
    baseline = baseline_of(group, groups)
    found = None if baseline is None else difference(group, baseline, measure)
    return {} if found is None else {f"{measure.title} minus LoRA": found.text(measure.digits, sign=True)}


def _seeds(group: Group) -> str:
    lost = len(group.runs) - len(group.whole)
    return str(len(group.runs)) + (f"\n{lost} diverged" if lost else "")


def _best(groups: Sequence[Group], measure: Measure) -> float | None:
    means = [interval.mean for group in groups if (interval := group.interval(measure.name)) is not None]
    return max(means, key=lambda mean: measure.sign * mean, default=None) if len(means) > 1 else None


def _cell(group: Group, measure: Measure, best: float | None) -> str:
    found = group.interval(measure.name)
    if found is None:
        return NOTHING
    if measure.name == "trainable_parameters":
        return f"{found.mean:,.0f}"
    return found.text(measure.digits) + "*" * (best is not None and found.mean == best)


def verdicts(of_task: OfTask) -> list[str]:
    """The best by the first measure; what is ahead of LoRA, behind it, or neither; what has diverged."""
    measure = of_task.measures[0]
    what = f"{measure.title[0].lower()}{measure.title[1:]}"
    known = [(found, group) for group in of_task.groups if (found := group.interval(measure.name)) is not None]
    said: dict[str, list[str]] = {}
    for each in of_task.groups:
        baseline = baseline_of(each, of_task.groups)
        interval = None if baseline is None else difference(each, baseline, measure)
        if interval is not None:
            better = Interval(-measure.sign * interval.mean, interval.half, interval.n)  # lower is better there
            said.setdefault(verdict(better), []).append(each.name)
    parts = [f"Against LoRA by it, seed by seed, {words}: {'; '.join(names)}." for words, names in said.items()]
    lost = [f"{each.name} ({len(each.runs) - len(each.whole)} of {counted(len(each.runs), 'run')})"
            for each in of_task.groups if len(each.whole) < len(each.runs)]  # fmt: skip
    return [
        _best_of(known, measure, what) if known else f"No run has a finite {what}.",
        *parts,
        *([f"Diverged, and not in the means: {'; '.join(lost)}."] if lost else []),
    ]


def _best_of(known: Sequence[tuple[Interval, Group]], measure: Measure, what: str) -> str:
    """The group with the best mean, or all that share it."""
    if len(known) == 1:
        found, group = known[0]
        return f"{group.name}: {what} {found.text(measure.digits)} ({counted(found.n, 'seed')})."
    mean = max((found.mean for found, _ in known), key=lambda mean: measure.sign * mean)
    first = [
        f"{group.name}, {found.text(measure.digits)} ({counted(found.n, 'seed')})"
        for found, group in known
        if found.mean == mean
    ]
    return f"Best {what} of {len(known)} rows: {'; '.join(first)}."
