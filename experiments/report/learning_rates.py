"""How learning rates were chosen: kept in a configuration file, shown as a table and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from eva_lightning import plots
from eva_lightning.errors import InputError
from eva_lightning.files import write_text
from eva_lightning.sealed import set_aside
from experiments.report.epochs import COLOURED, label, methods_of
from experiments.report.page import Figure, Table, drawn
from experiments.runner.tuning import Choice
from experiments.runner.yaml_files import read_yaml


@dataclass(frozen=True)
class Tuning:
    """What a page says about the choice of learning rates.

    Attributes:
        chosen: Methods and their rates, in words.
        rule: How the choice was made; empty where the configuration does not say.
        seeds: The seeds of the tuning runs, in words.
        command: What chose them.
        table: Scores by method and learning rate.
        sentences: What else they say.
        figures: The scores as lines.
    """

    chosen: str
    rule: str = ""
    seeds: str = ""
    command: str = ""
    table: Table | None = None
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()


def check_rates(rates: Mapping[str, float] | None, methods: Iterable[str]) -> dict[str, float]:
    """The learning rate of every method.

    Raises:
        InputError: One is missing or not above 0.
    """
    if rates is None:
        raise InputError("learning_rates are not given: choose them with --tune")
    for method in methods:
        if not rates.get(method, 0) > 0:
            raise InputError(f"learning_rates.{method} must be a number above 0, got {rates.get(method)}")
    return {method: rates[method] for method in methods}


def check_tuning(tuning: Mapping[str, Any] | None) -> None:
    """Make sure that what a configuration says about the choice of its rates is as :func:`write_choice` writes it.

    Raises:
        InputError: It is not.
    """
    if tuning is None or tuning.get("scores") in (None, []):
        return
    rule, seeds, scores = (tuning.get(name) for name in ("rule", "seeds", "scores"))
    fits = isinstance(rule, str) and isinstance(seeds, list) and seeds and isinstance(scores, list)
    if not fits or not all(isinstance(row, dict) and {"method", "lr"} <= set(row) for row in scores or ()):
        raise InputError(
            "tuning must have a rule, seeds, and scores with a method and lr each, as --tune writes it: leave it out, "
            "or choose the rates again"
        )


def chosen_rates(choices: Mapping[str, Choice]) -> dict[str, float]:
    """Learning rates out of the choices of cells that are named after methods."""
    return {method: choice.point.get("lr") for method, choice in choices.items()}


def write_choice(file: Path, header: str, rates: Mapping[str, float], tuning: Mapping[str, Any]) -> None:
    """Write learning rates and how they were chosen to a configuration file; other settings in it stay.

    A file that is no mapping, because it was cut, is set aside.
    """
    content = {**_known_settings(file), "learning_rates": dict(rates), "tuning": dict(tuning)}
    write_text(file, header + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))


def _known_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        known = read_yaml(file)
    except InputError as error:
        set_aside(file, str(error), "writing a new one")
        return {}
    if known is not None and not isinstance(known, dict):
        set_aside(file, f"{file} is damaged (no mapping in it)", "writing a new one")
        return {}
    return known or {}


def mean_scores(runs: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Means of `columns` over the tuning runs of every method and learning rate, with four digits."""
    means = runs.groupby(["method", "lr"], sort=False, as_index=False)[list(columns)].mean()
    return means.round(dict.fromkeys(columns, 4))


def scores_of(tuning: Mapping[str, Any] | None) -> pd.DataFrame:
    """One row per method and learning rate: ``method``, ``lr`` and the mean scores; empty where nothing is known."""
    return pd.DataFrame((tuning or {}).get("scores") or [], columns=None)


def scores_table(scores: pd.DataFrame, rates: Mapping[str, float], cell: Mapping[str, str], caption: str) -> Table:
    """Scores by method and learning rate, the chosen rate with an asterisk.

    Args:
        scores: As by :func:`scores_of`.
        rates: The learning rates chosen.
        cell: Column -> format, one for each line of a cell.
        caption: What a cell shows.
    """
    rows: dict[str, dict[str, str]] = {}
    for method in methods_of(scores):
        row = rows[label(method)] = {}
        for _, entry in scores[scores["method"] == method].sort_values("lr").iterrows():
            lines = [format(entry[column], form) for column, form in cell.items()]
            lines[0] += " *" * (rates.get(method) == entry["lr"])
            row[f"{entry['lr']:g}"] = "\n".join(lines)
    columns = [f"{lr:g}" for lr in sorted(scores["lr"].unique())]
    cells = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns).fillna("–")
    return Table(caption, cells.rename_axis("Method"), ("*: the rate chosen.",))


def chosen_in_words(rates: Mapping[str, float]) -> str:
    """``LoRA 0.03, EVA 0.01``."""
    return ", ".join(f"{label(method)} {rate:g}" for method, rate in rates.items())


def seeds_in_words(seeds: Sequence[int]) -> str:
    """``5 seeds (1000 to 1004)``."""
    return f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]})" if len(seeds) > 1 else f"seed {seeds[0]}"


def sensitivity_figure(scores: pd.DataFrame, column: str, what: str) -> Figure:
    """A score against the learning rate, one line per method."""
    lines = {
        label(method): dict(scores.loc[scores["method"] == method, ["lr", column]].itertuples(index=False))
        for method in methods_of(scores)
    }
    best = ", ".join(
        f"{name} {min(row.values()):.3g} at {min(row, key=row.__getitem__):g}" for name, row in lines.items()
    )
    figure = plots.rate_sensitivity(lines, "cross-entropy (nats)", title=what, order=COLOURED)
    return drawn(
        figure, f"{what} against the learning rate; lowest mean: {best}", "Mean over seeds; rings mark the lowest."
    )


def equal_rate_sentences(scores: pd.DataFrame, columns: Mapping[str, str], baseline: str = "lora") -> list[str]:
    """At how many learning rates of the grid an EVA method's mean score is below that of `baseline`.

    Args:
        scores: As by :func:`scores_of`.
        columns: Columns to count, with words for when they were taken: ``{"loss": "after epoch 10"}``.
        baseline: The method to compare with.
    """
    if scores.empty:
        return []
    by_rate = scores.pivot(index="lr", columns="method", values=list(columns))
    sentences = []
    for method in methods_of(scores):
        if not method.startswith("eva") or baseline not in scores["method"].to_numpy():
            continue
        counts = []
        for column, when in columns.items():
            both = by_rate[column][[method, baseline]].dropna()
            counts.append(f"at {int((both[method] < both[baseline]).sum())} of {len(both)} rates {when}")
        sentences.append(
            f"At equal learning rates, over the grid of the tuning, {label(method)} has a lower mean loss than "
            f"{label(baseline)} {' and '.join(counts)}."
        )
    return sentences
