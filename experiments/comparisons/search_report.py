"""What a search has chosen: a table, ``choices.csv`` with every candidate, and which of several ranks is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pandas import DataFrame

from eva_lightning.files import replacing
from experiments.comparisons.report import cell, table
from experiments.comparisons.search import SearchSettings
from experiments.comparisons.settings import Part, adapts
from experiments.runner.comparison import Results
from experiments.runner.jobs import Point
from experiments.runner.statistics import Interval, over_seeds
from experiments.runner.tuning import Choice


def score_in_words(score: tuple[float, ...]) -> str:
    """A score of the search: the geometric mean of losses, and the mean success before it where it was chosen by."""
    if not all(map(math.isfinite, score)):
        return "diverged"
    *success, loss = score
    return ", ".join([*(f"success {-rate:.3f}" for rate in success), f"loss {math.exp(loss):.4f}"])


def label_of(settings: SearchSettings, part: Part) -> str:
    """A part as tables have it."""
    rank = "" if part.rank is None else f" (r={part.rank})"
    task = "" if part.task is None else f", {part.task}"
    number = "" if part.demonstrations is None else f", {part.demonstrations} demonstrations"
    return f"{settings.labels[part.method]}{rank}{task}{number}"


def chosen(settings: SearchSettings, results: Results) -> str:
    """A Markdown table: which point was chosen for each part, among how many, and by what."""
    rows = {}
    for part, choice in _choices(settings, results):
        lr, rank, rho = _values(settings, part, choice.point)
        words = score_in_words(choice.score) if choice.score else "given"
        rows[label_of(settings, part)] = [f"{lr:g}", *_texts(rank, rho), words, str(len(choice.candidates) or "")]
    return table("", ["learning rate", "rank", "ρ", "chosen by", "of points"], rows) if rows else ""


def write_candidates(settings: SearchSettings, results: Results, file: Path) -> None:
    """Every point that was tried, with its mean score over the tuning runs, as CSV."""
    rows: list[dict[str, Any]] = []
    for part, choice in _choices(settings, results):
        for point, score in choice.candidates.items():
            lr, rank, rho = _values(settings, part, point)
            *success, loss = score
            rows.append(
                {
                    "method": part.method, "task": part.task, "demonstrations": part.demonstrations, "rank": rank,
                    "rho": rho, "lr": lr, "success": -success[0] if success else None, "loss": math.exp(loss),
                    "chosen": point == choice.point,
                }
            )  # fmt: skip
    columns = ["method", "task", "demonstrations", "rank", "rho", "lr", "success", "loss", "chosen"]
    if all(part.demonstrations is None for part in settings.parts):
        columns.remove("demonstrations")
    whole = {name: "Int64" for name in ("demonstrations", "rank") if name in columns}
    with replacing(file) as temporary:
        DataFrame(rows, columns=columns).astype(whole).to_csv(temporary, index=False)


def at_best_rank(settings: SearchSettings, results: Results) -> DataFrame:
    """The final runs, of several ranks that were tuned apart those of the one that was best in tuning."""
    runs = results.runs
    if "rank" not in settings.tune_per:
        return runs
    best: dict[tuple[str, str | None, int | None], Part] = {}
    for part, _ in sorted(_choices(settings, results), key=lambda found: (found[1].score, found[0].rank or 0)):
        if _of(runs, part).any():
            best.setdefault((part.method, part.task, part.demonstrations), part)
    keep = runs["method"].map(lambda _: False)
    for part in best.values():
        keep |= _of(runs, part)
    return runs[keep]


def by_rank(settings: SearchSettings, runs: DataFrame, column: str) -> str:
    """A Markdown table in the layout of the paper's Table 24: a line per method and rank, a column per task."""
    runs = runs[runs[column].notna()]
    rows = {}
    for method, label in settings.labels.items():
        of_method = runs[runs["method"] == method]
        for rank, group in of_method.groupby("rank", dropna=False):
            found: Mapping[Any, Interval] = over_seeds(group, column, by="task")
            means = [found[task].mean for task in settings.task_names if task in found]
            average = f"{sum(means) / len(means):.2f}" if len(means) == len(settings.task_names) else ""
            name = label if rank != rank else f"{label} (r={int(rank)})"
            rows[name] = [*(cell(found.get(task), 2) for task in settings.task_names), average]
    return table("", [*settings.task_names, "average"], rows) if rows else ""


def _choices(settings: SearchSettings, results: Results) -> list[tuple[Part, Choice]]:
    return [(part, results.choices[part.name]) for part in settings.parts if part.name in results.choices]


def _values(settings: SearchSettings, part: Part, point: Point) -> tuple[float, int | None, float | None]:
    rank = settings.rank_of(part, point) if adapts(part.method) else None
    return point.get("lr"), rank, settings.rho_of(part, point)


def _texts(rank: int | None, rho: float | None) -> tuple[str, str]:
    return "" if rank is None else str(rank), "" if rho is None else f"{rho:g}"


def _of(runs: DataFrame, part: Part) -> Any:
    """Which of the runs are those of a part."""
    found = runs["method"] == part.method
    if part.task is not None:
        found &= runs["task"] == part.task
    if part.demonstrations is not None:
        found &= runs["demonstrations"] == part.demonstrations
    return found if part.rank is None else found & (runs["rank"] == part.rank)
