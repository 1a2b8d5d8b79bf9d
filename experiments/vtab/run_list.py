"""Finished runs as a list, one a line: what ``table`` writes as ``runs.csv``, and reads in place of their folders.

Run folders take megabytes and are lost with their machine. The list keeps all that tables and figures are made of, so
that numbers in a document can be printed again from a file beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.errors import InputError
from eva_lightning.methods.registry import MethodKey
from eva_lightning.reading import reading
from experiments.runner.jobs import Point
from experiments.vtab.grid import score

_COLUMNS = [
    "experiment", "task", "method", "phase", "lr", "seed", "rank", "model", "weights", "epochs", "image_size",
    "train_images", "test_images", "accuracy", "loss", "seconds", "group", "official", "notes",
]  # fmt: skip
_TEXTS = ("experiment", "task", "method", "phase", "model", "weights", "group", "notes")
_NUMBERS = ("lr", "seed", "rank", "epochs", "image_size", "train_images", "test_images", "accuracy", "loss", "seconds")
_BETWEEN_NOTES = " | "
_REMEDY = "it must be a runs.csv that python -m experiments.vtab table has written"

#: Column of a run's epochs -> column of the list, in the order of epochs with spaces between them.
_LOSSES = {"train_loss": "train_losses", "val_loss": "val_losses"}


def as_list(runs: pd.DataFrame, histories: pd.DataFrame) -> str:
    """The list of `runs` as CSV.

    Args:
        runs: As :func:`~experiments.vtab.table_results.read_runs` gives them.
        histories: Losses by epoch, as :func:`~experiments.vtab.own_curves.read_histories` gives them.
    """
    frame = runs.assign(
        rank=pd.array([point.get("rank") for point in runs["point"]], dtype="Int64"),
        notes=[_BETWEEN_NOTES.join(notes) for notes in runs["notes"]],
    )
    columns = list(_COLUMNS)
    for loss, column in _LOSSES.items():
        known = histories[histories[loss].notna()] if loss in histories else histories
        if len(known):
            by_run = known.sort_values("epoch").groupby("place")[loss]
            losses = by_run.agg(lambda values: " ".join(map(repr, values.tolist())))
            frame[column], columns = frame["place"].map(losses), [*columns, column]
    frame = frame.sort_values(columns[:7], kind="stable")[columns]
    return frame.to_csv(index=False, lineterminator="\n")


def read_list(file: Path, select: str = "accuracy") -> list[dict[str, Any]]:
    """The runs of a list, as :func:`~experiments.vtab.table_results.run_row` gives them, with their losses by epoch.

    Args:
        file: The list.
        select: What tuning was judged by, as the sweep's option.

    Raises:
        InputError: The file is none, or damaged; names the line where one is to blame.
    """
    with reading(file, _REMEDY):
        frame = pd.read_csv(
            file, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=[""], float_precision="round_trip"
        )
        if lacking := [column for column in _COLUMNS if column not in frame]:
            raise InputError(f"no column {lacking[0]}")
        frame = frame.assign(**{name: pd.to_numeric(frame[name]) for name in _NUMBERS}).astype({"seed": int})
        keys = [MethodKey.parse(method) for method in frame["method"]]
        losses = [_losses(run) for run in frame.to_dict("records")]
    for column, is_right, expected in (
        ("phase", frame["phase"].isin(("tune", "final")), "tune or final"),
        ("lr", frame["lr"].between(0, math.inf, inclusive="neither"), "a number above 0"),
        ("accuracy", frame["accuracy"].between(0, 100), "a percentage"),
        ("rank", frame["rank"].isna() | frame["rank"].between(1, 2**31), "a number of at least 1"),
        *((name, frame[name].notna(), "a name") for name in ("experiment", "task", "model", "group")),
        ("official", frame["official"].isin((True, False)), "True or False"),
    ):
        for index in frame.index[~is_right][:1]:
            raise InputError(f"{file}, line {index + 2}: {column} must be {expected}, got {frame.loc[index, column]}")
    return [
        {
            **{name: None if pd.isna(run[name]) else run[name] for name in _COLUMNS if name != "rank"},
            "family": key.method,
            "rho": key.rho,
            "point": Point.of(lr=run["lr"], rank=None if pd.isna(run["rank"]) else int(run["rank"])),
            "score": score({**run, "accuracy": run["accuracy"] / 100}, select),
            "notes": () if pd.isna(run["notes"]) else tuple(run["notes"].split(_BETWEEN_NOTES)),
            "seconds": float(run["seconds"]),
            "place": f"{file}, line {number}",
            "losses": of_run,
        }
        for number, (run, key, of_run) in enumerate(zip(frame.to_dict("records"), keys, losses, strict=True), start=2)
    ]


def _losses(run: Mapping[str, Any]) -> pd.DataFrame | None:
    """Columns ``epoch``, ``train_loss`` and ``val_loss`` of one line; None where it has no losses."""
    found = {loss: str(run[column]).split() for loss, column in _LOSSES.items() if not pd.isna(run.get(column))}
    if "train_loss" not in found:
        return None
    frame = pd.DataFrame({loss: [float(value) for value in values] for loss, values in found.items()})
    if not (frame > 0).all(axis=None):
        raise InputError("a loss is no positive number")
    return frame.assign(epoch=range(1, len(frame) + 1)).reindex(columns=["epoch", *_LOSSES])
