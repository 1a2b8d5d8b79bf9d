"""The report of a Meta-World comparison that looks at success early and late, with few and with more demonstrations.

Success is compared by interquartile means with stratified bootstrap intervals (Agarwal et al. 2021, "Deep Reinforcement
Learning at the Edge of the Statistical Precipice"), and by paired differences whose intervals are corrected for their
number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame

from eva_lightning.files import file_digest
from experiments.comparisons.evidence import BASELINES, Evidence
from experiments.comparisons.looks_figures import iqm_figure, looks_figure
from experiments.comparisons.metaworld import BEFORE, Settings
from experiments.comparisons.metaworld_report import SIZES, with_both
from experiments.comparisons.report import cell, sizes_table, table, tuning, write_report
from experiments.comparisons.search_report import at_best_rank, chosen, write_candidates
from experiments.metaworld.success import EXPERTS_NOTE, PAPER_EPISODES, PAPER_NOTE, Definition, definitions
from experiments.runner.comparison import Results
from experiments.runner.statistics import PLUS_MINUS_BY_TASK, Interval, Range, by_task, iqm, paired_by_task
from experiments.runner.tables import NOTHING

FIGURES = ("looks.png", "iqm.png")
_BEFORE_LABEL = "pre-trained, zero-shot"


@dataclass(frozen=True)
class Setting:
    """One number of demonstrations and one look.

    Attributes:
        evidence: All runs with so many demonstrations.
        number: That number.
        step: Steps trained when success was measured.
    """

    evidence: Evidence
    number: int
    step: int

    @property
    def title(self) -> str:
        """What columns call it."""
        return f"{self.number} demonstrations, {self.step} steps"

    def success(self, definition: Definition) -> DataFrame:
        """The runs, with success then in the column ``value``."""
        return self.evidence.runs.assign(value=self.evidence.runs[column_of(definition, self.step)])

    def loss(self) -> DataFrame:
        """The same of the validation loss."""
        return self.evidence.runs.assign(value=self.evidence.runs[f"val_loss_{self.step}"])


def column_of(definition: Definition, step: int) -> str:
    """Where results have success after `step` steps."""
    return f"{definition.rate}_{step}"


def write(settings: Settings, results: Results) -> Path:
    """Write all files; returns the report."""
    evidence = evidence_of(settings, results)
    looks = [Setting(of(evidence, n), n, step) for n in numbers_of(evidence) for step in settings.look_steps]
    losses = [Setting(of(evidence, n), n, step) for n in numbers_of(evidence) for step in settings.val_steps]
    both = definitions(settings.success)
    differences = {each.title: _differences(looks, pairs_of(evidence), each) for each in both}
    figures = {
        "looks": looks_figure(looks, settings.task_names, both[0]),
        "iqm": iqm_figure({look.title: _iqms(look, both[0]) for look in looks}, evidence.labels, both[0]),
    }
    context = {
        "wanted": _wanted(settings),
        "digest": file_digest(settings.init)[:12],
        "numbers": " and ".join(map(str, numbers_of(evidence))),
        "look_steps": " and ".join(map(str, settings.look_steps)),
        "tuning_tasks": ", ".join(map(_short, settings.tuning_tasks)),
        "in_short": "\n".join(line for each in both for line in in_short(looks, pairs_of(evidence), each)),
        "chosen": chosen(settings, results),
        "tuning": tuning(settings, results, lambda score: f"{math.exp(score):.4f}"),
        "iqms": {each.title: _iqm_table(looks, evidence, each) for each in both},
        "means": {each.title: _mean_table(looks, evidence, each) for each in both},
        "tasks": {each.title: _task_tables(settings, evidence, each) for each in both},
        "differences": differences,
        "comparisons": len(looks) * len(pairs_of(evidence)),
        "losses": _loss_differences(losses, pairs_of(evidence)),
        "loss_comparisons": len(losses) * len(pairs_of(evidence)),
        "plus_minus_by_task": PLUS_MINUS_BY_TASK,
        "paper_note": f"{PAPER_NOTE} {PAPER_EPISODES} {EXPERTS_NOTE}",
        "sizes": sizes_table(evidence, SIZES),
    }  # fmt: skip
    write_candidates(settings, results, Path(settings.output) / "choices.csv")
    return write_report("looks", settings, results, evidence, figures, context)


def evidence_of(settings: Settings, results: Results) -> Evidence:
    """All runs, of every number of demonstrations, those before fine-tuning among them.

    Success after each look is in columns of its own (:func:`column_of`); before fine-tuning it is the same at each.
    """
    runs = with_both(at_best_rank(settings, results))
    if "demonstrations" not in runs:
        runs = runs.assign(demonstrations=settings.train_episodes)
    if "val_loss" not in runs:
        runs = runs.assign(val_loss=None)
    runs = runs.assign(val_loss=[rows if isinstance(rows, list) else [] for rows in runs["val_loss"]])
    for each in definitions():
        for step in settings.look_steps:
            values = [_success(run, each, step, settings.max_steps) for run in runs.to_dict("records")]
            runs = runs.assign(**{column_of(each, step): values})
    known = Evidence.of(settings, runs, "val_loss", "updates")
    first = {BEFORE: _BEFORE_LABEL} if (runs["method"] == BEFORE).any() else {}
    return Evidence(known.runs, {**first, **known.labels})


def _success(run: Mapping[Any, Any], definition: Definition, step: int, last: int) -> float:
    """Success of a run after `step` steps; NaN where it was not rolled out."""
    if step == last or run["method"] == BEFORE:
        found = run[definition.rate]
    else:
        looks = run.get("looks")
        rows = looks if isinstance(looks, list) else []
        found = next((row[definition.rate] for row in rows if row["updates"] == step), None)
    return math.nan if found is None else float(found)


def numbers_of(evidence: Evidence) -> list[int]:
    """Numbers of demonstrations that have runs."""
    return sorted({int(number) for number in evidence.runs["demonstrations"]})


def of(evidence: Evidence, number: int) -> Evidence:
    """Those of one number of demonstrations."""
    return Evidence(evidence.runs[evidence.runs["demonstrations"] == number], evidence.labels)


def pairs_of(evidence: Evidence) -> list[tuple[str, str]]:
    """Each method with EVA and the same one without."""
    return [(first, second) for first, second in evidence.pairs if BASELINES[first.partition(":")[0]][-1] == second]


def _wanted(settings: Settings) -> int:
    before = len(settings.numbers) * len(settings.task_names) if settings.zero_shot else 0
    tasks = len(settings.task_names)
    return before + settings.seeds * sum(tasks if part.task is None else 1 for part in settings.parts)


def _short(task: str) -> str:
    return task.removesuffix("-v3")


def _iqms(look: Setting, definition: Definition) -> dict[Any, Range]:
    return iqm(look.success(definition).dropna(subset=["value"]), "value")


def _iqm_table(looks: Sequence[Setting], evidence: Evidence, definition: Definition) -> str:
    return _by_look(looks, evidence, [_iqms(look, definition) for look in looks])


def _mean_table(looks: Sequence[Setting], evidence: Evidence, definition: Definition) -> str:
    return _by_look(looks, evidence, [by_task(look.success(definition), "value") for look in looks])


def _by_look(
    looks: Sequence[Setting], evidence: Evidence, columns: Sequence[Mapping[Any, Interval] | Mapping[Any, Range]]
) -> str:
    """One line per method, one column per number of demonstrations and look; a single run has no interval."""

    def text(found: Interval | Range | None) -> str:
        if found is None:
            return NOTHING
        return f"{found.mean:.2f}" if found.n == 1 else found.text(2)

    rows = {label: [text(column.get(key)) for column in columns] for key, label in evidence.labels.items()}
    return table("", [look.title for look in looks], rows)


def _task_tables(settings: Settings, evidence: Evidence, definition: Definition) -> dict[int, str]:
    """Number of demonstrations -> mean success over seeds of each task at all looks: ``0.20 → 0.90``."""
    steps = settings.look_steps

    def text(runs: DataFrame, task: str) -> str:
        means = [runs.loc[runs["task"] == task, column_of(definition, step)].mean() for step in steps]
        return " → ".join(NOTHING if math.isnan(mean) else f"{mean:.2f}" for mean in means)

    found = {}
    for number in numbers_of(evidence):
        runs = of(evidence, number).runs
        rows = {
            label: [text(runs[runs["method"] == key], task) for task in settings.task_names]
            for key, label in evidence.labels.items()
        }
        found[number] = table("", map(_short, settings.task_names), rows)
    return found


def _differences(looks: Sequence[Setting], pairs: Sequence[tuple[str, str]], definition: Definition) -> str:
    number = len(looks) * len(pairs)
    columns = {
        look.title: [paired_by_task(look.success(definition), *pair, "value", comparisons=number) for pair in pairs]
        for look in looks
    }
    return _pairs_table(looks, pairs, columns, 2)


def _loss_differences(looks: Sequence[Setting], pairs: Sequence[tuple[str, str]]) -> str:
    number = len(looks) * len(pairs)
    columns = {
        look.title: [paired_by_task(look.loss(), *pair, "value", relative=True, comparisons=number) for pair in pairs]
        for look in looks
    }
    return _pairs_table(looks, pairs, columns, 1)


def _pairs_table(
    looks: Sequence[Setting],
    pairs: Sequence[tuple[str, str]],
    columns: Mapping[str, Sequence[Interval | None]],
    digits: int,
) -> str:
    rows = {
        _pair_label(looks, pair): [cell(column[place], digits, sign=True) or NOTHING for column in columns.values()]
        for place, pair in enumerate(pairs)
    }
    return table("", columns, rows) if rows else ""


def _pair_label(looks: Sequence[Setting], pair: tuple[str, str]) -> str:
    labels = looks[0].evidence.labels
    return f"{labels[pair[0]]} minus {labels[pair[1]]}"


def in_short(looks: Sequence[Setting], pairs: Sequence[tuple[str, str]], definition: Definition) -> Iterable[str]:
    """Which differences are left after the correction, as a line of a list; none where no interval is known."""
    number = len(looks) * len(pairs)
    found = {
        f"{_pair_label(looks, pair)}, {look.title}": paired_by_task(
            look.success(definition), *pair, "value", comparisons=number
        )
        for pair in pairs
        for look in looks
    }
    known = {name: each for name, each in found.items() if each is not None and each.half is not None}
    if not known:
        return
    left = "; ".join(f"{name} {each.text(2, sign=True)}" for name, each in known.items() if each.excludes_zero)
    above, below = (sum(each.mean * sign > 0 for each in known.values()) for sign in (1, -1))
    clear = sum(each.excludes_zero for each in known.values())
    yield (
        f"- Success {definition.phrase}, with EVA minus without: of {len(known)} differences {clear} exclude 0 after "
        f"the correction for their number{': ' + left if left else ''}; {above} are above 0, {below} below."
    )
