"""Reads what runs recorded of their gradients, prints a table and draws the paper's Figure 4."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from eva_lightning import plots
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import writable_folder
from eva_lightning.methods import METHODS, MethodKey
from eva_lightning.ours import claim
from eva_lightning.reading import reading
from experiments.analysis.gradient_norms import Settings
from experiments.runner import tables
from experiments.runner.gradient_norms import FILE
from experiments.runner.yaml_files import read_yaml

NORM, OF_A, OF_B, LOSS = (
    "gradient norm, A and B (FFT: weights)",
    "gradient norm of A",
    "of B",
    "training loss",
)
_PANELS = {"norm": NORM, "a": OF_A, "b": OF_B, "train_loss": LOSS}
_REMEDY = "delete it, or run again with --overwrite"


def compare(settings: Settings) -> pd.DataFrame:
    """Draw a figure per task and print a table; returns the rows of all runs with ``task``, ``label`` and ``run``."""
    rows = _read(settings)
    output = writable_folder(settings.output)
    claim(output, ("fig4_*.png",), "choose another --output")
    for task, of_task in rows.groupby("task", sort=True):
        shown = _labelled(of_task)
        for name, columns in (("norms", ("norm", "train_loss")), ("a_and_b", ("a", "b"))):
            panels = {_PANELS[column]: found for column in columns if (found := _panel(shown, column))}
            if panels:
                title = f"{task}, mean and standard deviation over runs"
                figure = plots.early_steps(panels, (NORM, OF_A, OF_B), list(shown["label"].unique()), title)
                plots.save(figure, output / f"fig4_gradient_{name}_{task}.png", dpi=110)
        console = Console(width=None if sys.stdout.isatty() else 120)
        tables.show(_table(shown), f"{task}: means over runs", console=console)
    print(f"figures in {output}")
    return rows


def _read(settings: Settings) -> pd.DataFrame:
    frames = [frame for folder in settings.runs for frame in _below(Path(folder))]
    if not frames:
        raise MissingInputError(
            f"no run below {', '.join(settings.runs)} has a {FILE}: make runs with --gradient-norms 100"
        )
    rows = pd.concat(frames, ignore_index=True)
    if settings.tasks is not None:
        there = sorted(rows["task"].unique())
        missing = [task for task in settings.tasks if task not in there]
        if missing:
            raise InputError(
                f"tasks must be among those of the runs, {', '.join(there)}, got {missing[0]}", setting="tasks"
            )
        rows = rows[rows["task"].isin(settings.tasks)]
    return rows if settings.steps is None else rows[rows["step"] <= settings.steps]


def _below(folder: Path) -> Iterator[pd.DataFrame]:
    if not folder.is_dir():
        raise MissingInputError(f"there is no folder {folder}", setting="runs")
    for file in sorted(folder.rglob(FILE)):
        config = read_yaml(file.parent / "config.yaml", _REMEDY)
        with reading(file, _REMEDY):
            frame = pd.read_csv(file)
            frame = frame[["step", "a", "b", "norm", "train_loss"]].astype(float)
        yield frame.assign(run=str(file.parent), **_about(config, file.parent))


def _about(config: Any, folder: Path) -> dict[str, Any]:
    try:
        key = MethodKey(config["method"], float(config["rho"]) if METHODS[config["method"]].redistributes else None)
        tasks = config["task"]
        task = tasks if isinstance(tasks, str) else ", ".join(tasks)
        return {"task": re.sub(r"[^\w.-]+", "-", task), "method": key.key, "lr": config["lr"], "rank": config["rank"]}
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.yaml'} is of no fine-tuning: {error} is missing in it; {_REMEDY}"
        ) from error


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """With ``label``: the method's, and what else tells its runs apart."""
    order = {name: place for place, name in enumerate(METHODS)}
    keys = {key: MethodKey.parse(key) for key in rows["method"].unique()}
    several = {
        key: [name for name in ("lr", "rank") if rows.loc[rows["method"] == key, name].nunique() > 1] for key in keys
    }

    def label(row: Any) -> str:
        words = {"lr": f"lr {row.lr:g}", "rank": f"r {row.rank:g}"}
        return ", ".join([keys[row.method].label, *(words[name] for name in several[row.method])])

    names = {(r.method, r.lr, r.rank): label(r) for r in rows[["method", "lr", "rank"]].drop_duplicates().itertuples()}
    labels = [names[key] for key in zip(rows["method"], rows["lr"], rows["rank"], strict=True)]
    place = [order[keys[key].method] for key in rows["method"]]
    return rows.assign(label=labels, place=place).sort_values(["place", "label", "step"], kind="stable")


def _panel(rows: pd.DataFrame, column: str) -> dict[str, dict[float, list[float]]]:
    """Label -> step -> values of its runs; without those that have none."""
    known = rows[rows[column].notna()]
    return {
        str(label): {float(step): list(values) for step, values in of_label.groupby("step")[column]}
        for label, of_label in known.groupby("label", sort=False)
    }


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for label, found in rows.groupby("label", sort=False):
        by_step = found.groupby("step")[["norm", "a", "b", "train_loss"]].mean()
        last = by_step.index.max()
        middle = min(10.0, last)
        lines.append(
            {
                "method": label, "runs": str(found["run"].nunique()),
                "norm at step 1": _number(by_step["norm"].iloc[0]),
                f"at step {middle:g}": _number(by_step["norm"][middle]),
                f"mean of {last:g}": _number(by_step["norm"].mean()),
                "A, mean": _number(by_step["a"].mean()), "B, mean": _number(by_step["b"].mean()),
                "loss at 1": _number(by_step["train_loss"].iloc[0]),
                f"loss at {last:g}": _number(by_step["train_loss"].iloc[-1]),
            }
        )  # fmt: skip
    return pd.DataFrame(lines).set_index("method")


def _number(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.3g}"
