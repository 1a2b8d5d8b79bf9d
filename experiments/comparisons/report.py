"""What the reports of all comparisons share: tables, sentences, and the files they are written to."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from pandas import DataFrame
from scipy.stats import t as student_t

from eva_lightning import plots
from eva_lightning.files import replacing, write_text
from experiments.comparisons.evidence import REFERENCE, Evidence, Quantity
from experiments.comparisons.settings import FIRST_TUNING_SEED, MethodSettings
from experiments.runner.comparison import Results
from experiments.runner.statistics import BRACKETS, PLUS_MINUS, Interval
from experiments.runner.tables import as_markdown
from experiments.runner.tuning import Choice


def table(corner: str, head: Iterable[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table: label -> cells."""
    return as_markdown(DataFrame.from_dict(rows, orient="index", columns=list(head)).rename_axis(corner))


def means_table(evidence: Evidence, quantities: Sequence[Quantity], corner: str = "") -> str:
    """One line per method, one column per quantity."""
    columns = [(evidence.means(each), each.digits) for each in quantities]
    rows = {
        label: [cell(means.get(key), digits) for means, digits in columns] for key, label in evidence.labels.items()
    }
    return table(corner, [each.heading for each in quantities], rows)


def differences_table(
    quantities: Sequence[Quantity], rows: Mapping[str, tuple[Evidence, str, str]], corner: str = ""
) -> str:
    """One line per pair of methods, the first minus the second; bold where the interval excludes 0."""
    cells = {
        label: [cell(evidence.difference(first, second, each), each.digits, sign=True) for each in quantities]
        for label, (evidence, first, second) in rows.items()
    }
    return table(corner, [each.heading for each in quantities], cells)


def against_reference(evidence: Evidence, quantities: Sequence[Quantity], methods: Sequence[str]) -> str:
    """Differences of `methods` to the reference; empty where there are none."""
    rows = {evidence.labels[key]: (evidence, key, REFERENCE) for key in methods}
    return differences_table(quantities, rows) if rows else ""


def sizes_table(evidence: Evidence, columns: Mapping[str, tuple[str, int]]) -> str:
    """Means of some columns over a method's runs: title -> column and digits."""

    def mean(key: str, column: str, digits: int) -> str:
        values = evidence.runs.loc[evidence.runs["method"] == key, column].dropna() if column in evidence.runs else []
        return f"{np.mean(values):,.{digits}f}" if len(values) else ""

    rows = {label: [mean(key, *what) for what in columns.values()] for key, label in evidence.labels.items()}
    return table("", columns, rows)


def cell(interval: Interval | None, digits: int, sign: bool = False) -> str:
    """An interval as tables have it; bold where it is that of a difference and excludes 0."""
    if interval is None:
        return ""
    text = interval.text(digits, sign)
    return f"**{text}**" if sign and interval.excludes_zero else text


def difference_sentences(evidence: Evidence, quantities: Sequence[Quantity]) -> list[str]:
    """How EVA differs from what it is compared with, one line of a list for each pair."""
    lines = []
    for first, second in evidence.pairs:
        found = [(each, evidence.difference(first, second, each)) for each in quantities]
        words = [
            f"{each.title} {interval.text(each.digits, sign=True)}{each.unit}{_verdict(interval)}"
            for each, interval in found
            if interval is not None
        ]
        if words:
            lines.append(f"- {evidence.labels[first]} minus {evidence.labels[second]}: {'; '.join(words)}.")
    return lines


def _verdict(interval: Interval) -> str:
    if interval.half is None:
        return ""
    return " (significant)" if interval.excludes_zero else " (not significant)"


def significance_sentence(evidence: Evidence, quantity: Quantity, methods: Sequence[str]) -> list[str]:
    """Which methods differ significantly from the reference, as a line of a list; none where no interval is known."""
    found = {key: evidence.difference(key, REFERENCE, quantity) for key in methods}
    known = {key: interval for key, interval in found.items() if interval is not None and interval.half is not None}
    if not known:
        return []
    better = 1 if quantity.higher_is_better else -1
    words = []
    for name, sign in (("better", better), ("worse", -better)):
        members = [(key, each) for key, each in known.items() if each.excludes_zero and each.mean * sign > 0]
        listed = [
            f"{evidence.labels[key]} ({each.mean:+.{quantity.digits}f}{quantity.unit}{'*' * remains(each, len(known))})"
            for key, each in sorted(members, key=lambda member: -abs(member[1].mean))
        ]
        words.append(f"{name} than {evidence.labels[REFERENCE]}: {', '.join(listed) or 'none'}")
    same = sum(not interval.excludes_zero for interval in known.values())
    title = quantity.title[0].upper() + quantity.title[1:]
    return [f"- {title}: {'; '.join(words)}; no significant difference: {same} of {len(known)}."]


def remains(interval: Interval, comparisons: int) -> bool:
    """Whether 0 lies outside of the interval also at the level 1 - 0.05 / `comparisons` (Bonferroni)."""
    if interval.half is None:
        return False
    corrected, plain = student_t.ppf([1 - 0.025 / comparisons, 0.975], interval.n - 1)
    return bool(abs(interval.mean) > corrected / plain * interval.half)


#: What :func:`write_report` writes besides figures.
REPORT_FILES = ("report.md", "results.csv")


def tuning(settings: MethodSettings, results: Results, shown: Callable[[float], str]) -> dict[str, Any]:
    """What each learning rate was worth in tuning, for the template ``learning_rates``.

    Args:
        settings: What was asked for.
        results: With the choice of each method.
        shown: Text of a score.

    Returns:
        ``table``: one line per method, the learning rate chosen in bold; ``edges``: labels of methods whose choice is
        the lowest or the highest that was tried; ``given``: methods whose learning rate was given; ``runs``: how many;
        ``seeds``: which, in words.
    """
    named = {part.name: settings.labels[part.method] for part in settings.parts}
    tuned = {name: c for name in named if (c := results.choices.get(name)) is not None and c.candidates}
    scores = {name: _by_rate(choice) for name, choice in tuned.items()}
    tried = sorted({lr for by_rate in scores.values() for lr in by_rate})
    rows, edges = {}, []
    for key, by_rate in scores.items():
        chosen, label = tuned[key].point.get("lr"), named[key]
        texts = {lr: shown(score) if math.isfinite(score) else "diverged" for lr, score in by_rate.items()}
        rows[label] = [f"**{texts[lr]}**" if lr == chosen else texts.get(lr, "") for lr in tried]
        if chosen in (min(by_rate), max(by_rate)):
            edges.append(label)
    text = table("", [f"{lr:g}" for lr in tried], rows) if rows else ""
    rates = settings.given_rates
    given = [f"{label}: {rates[key]:g}" for key, label in settings.labels.items() if key in rates]
    first, many = FIRST_TUNING_SEED, settings.tune_seeds > 1
    seeds = f"{settings.tune_seeds} seeds from {first}" if many else f"seed {first}"
    return {"table": text, "edges": edges, "given": given, "runs": len(results.tuning), "seeds": seeds}


def _by_rate(choice: Choice) -> dict[float, float]:
    """Learning rate -> the least score of the points that have it."""
    found: dict[float, float] = {}
    for point, score in choice.candidates.items():
        found[point.get("lr")] = min(score[0], found.get(point.get("lr"), math.inf))
    return found


def write_report(
    template: str,
    settings: MethodSettings,
    results: Results,
    evidence: Evidence,
    figures: Mapping[str, Figure],
    context: Mapping[str, Any],
) -> Path:
    """Write ``report.md``, ``results.csv`` and the figures; returns the report.

    Args:
        template: Name of its template in ``templates``.
        settings, results: What was asked for, and what came out.
        evidence: Of the finished runs.
        figures: Name -> figure.
        context: What else the template needs.
    """
    folder = Path(settings.output)
    with replacing(folder / "results.csv") as file:
        evidence.runs.to_csv(file, index=False)
    for name, figure in figures.items():
        plots.save(figure, folder / f"{name}.png", dpi=110)
    environment = Environment(loader=PackageLoader("experiments.comparisons"), undefined=StrictUndefined)
    environment.filters["thousands"] = "{:,}".format
    shared = {
        "settings": settings,
        "figures": list(figures),
        "finished": len(results.runs),
        "minutes": f"{results.seconds / 60:.0f}",
        "failures": [(job, error.strip().splitlines()[-1]) for job, error in results.failures],
        "machine": f"{os.cpu_count()} cores ({platform.machine()})",
        "plus_minus": PLUS_MINUS,
        "brackets": BRACKETS,
    }
    text = environment.get_template(f"{template}.md.jinja").render(shared | dict(context))
    report = folder / "report.md"
    write_text(report, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return report
