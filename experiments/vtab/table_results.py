"""Our own results for the tables: finished runs out of run folders as one data frame, gathered by method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import digest
from eva_lightning.methods.registry import METHODS, MethodKey
from experiments.runner.jobs import Point
from experiments.runner.run_folder import metrics_below
from experiments.runner.settings import Role, identity, role_of
from experiments.runner.statistics import Sample
from experiments.runner.tuning import choose
from experiments.vtab.grid import PAPER, score
from experiments.vtab.settings import Settings
from experiments.vtab.table_paper import HEADINGS, SEEDS

#: Names of the model of the paper's tables.
PAPER_MODELS = ("dinov2_g14", "vit_giant_patch14_dinov2.lvd142m")

_PLACE = ["experiment", "method", "task"]
_PHASES = {"test": "final", "val200": "tune"}


@dataclass(frozen=True)
class Ours:
    """Our results by one method in one experiment, over tasks and seeds.

    Attributes:
        key: The method.
        experiment: Identity of the settings that all methods of an experiment share.
        samples: Task -> accuracy in percent over seeds.
        notes: Why the results cannot be compared with the paper's; empty where they can.
        is_ambiguous: There is another entry of the same method and notes.
    """

    key: MethodKey
    experiment: str
    samples: Mapping[str, Sample]
    notes: tuple[str, ...]
    is_ambiguous: bool = False

    @property
    def label(self) -> str:
        """The method as the paper writes it, with the experiment's identity if two entries are alike otherwise."""
        return self.key.label + (f" #{self.experiment[:6]}" if self.is_ambiguous else "")


def read_runs(folders: Iterable[str | Path]) -> pd.DataFrame:
    """The finished runs below `folders`, also while a sweep writes them: one row per run, in order of their paths.

    Returns:
        Columns ``experiment`` (identity of the settings that are not one run's), ``model``, ``method`` (with its ρ),
        ``task``, ``phase`` (``"tune"`` or ``"final"``), ``seed``, ``point`` (learning rate and rank), ``accuracy`` (in
        percent), ``loss``, ``notes`` (why it cannot be compared with the paper's), ``place`` (the folder).

    Raises:
        MissingInputError: One of `folders` is none, or no final run is finished; says what to run.
        InputError: A file is damaged.
    """
    rows, folders = [], [*map(Path, folders)]
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise MissingInputError(
                f"the folder of runs {folder} does not exist: python -m experiments.vtab sweep --root DIR makes "
                "runs/vtab; other folders are named by --runs"
            )
        rows += [run_row(metrics, str(place)) for place, metrics in metrics_below(folder) if _is_ours(metrics)]
    runs = pd.DataFrame(rows)
    if runs.empty or "final" not in set(runs["phase"]):
        progress = f" ({len(runs)} tuning runs are)" if len(runs) else ""
        raise MissingInputError(
            f"no final run is finished below {', '.join(map(str, folders))}{progress}: python -m experiments.vtab "
            "sweep --root DIR makes and continues them"
        )
    return runs


def _is_ours(metrics: Mapping[str, Any]) -> bool:
    """Whether a run is one on VTAB-1K."""
    known = metrics.get("task") in HEADINGS and metrics.get("method") in METHODS and "experiment" in metrics
    return known and metrics.get("evaluation_split") in _PHASES


def run_row(metrics: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row of the frame from what ``metrics.json`` in the folder `place` holds."""
    phase = _PHASES[metrics["evaluation_split"]]
    return {
        "experiment": digest(metrics["experiment"]),
        "model": metrics["model"],
        "method": MethodKey(metrics["method"], metrics.get("rho")).key,
        "task": metrics["task"],
        "phase": phase,
        "seed": int(metrics["seed"]),
        "point": Point.of(lr=metrics["lr"], rank=metrics.get("rank")),
        "accuracy": 100 * float(metrics["accuracy"]),
        "loss": float(metrics["loss"]),
        "notes": tuple(_differences(metrics)) if phase == "final" else (),
        "place": place,
    }


def _differences(metrics: Mapping[str, Any]) -> Iterable[str]:
    """Sentences on what tells a run from the paper's, whose settings are the defaults."""
    settings = metrics["experiment"]
    defaults = identity(Settings(root="", task=next(iter(HEADINGS))), Role.RESULT, without=Role.PER_RUN)
    # what a machine does in its own way keeps results comparable
    where = {item.name for item in fields(Settings) if Role.PLACE in role_of(item)}
    names = dict.fromkeys((*defaults, *settings))
    changed = {name: settings.get(name) for name in names if settings.get(name) != defaults.get(name)}
    model, weights, protocol = (changed.pop(name, None) for name in ("model", "weights", "protocol"))
    if model not in (None, *PAPER_MODELS):
        yield f"model {model} instead of DINOv2-g/14"
    if weights == "none":
        yield "random weights instead of pre-trained ones"
    elif weights is not None:
        yield f"weights of the file {Path(str(weights).split(':')[0]).name}"
    if protocol is not None:
        yield f"protocol {protocol}, not the text of the paper"
    if metrics.get("limited"):
        yield "limited to a part of the data"
    elif not metrics.get("official_sizes", True):
        yield "data of other than the official sizes"
    others = {k: v for k, v in changed.items() if k not in where and not k.startswith("limit_")}
    if others:
        words = ", ".join(f"{name} {value} (default: {defaults[name]})" for name, value in others.items())
        yield f"other settings than the defaults, which are the paper's: {words}"


def gather(runs: pd.DataFrame) -> list[Ours]:
    """One entry per method and experiment, in the order of the method registry; a run found twice counts once.

    Where there are final runs of several learning rates and ranks, as after a larger grid, those of the best tuning
    count.

    Raises:
        InputError: Two runs of the same task and seed differ in learning rate, rank or result: says where both are.
    """
    trials = dict(list(runs[runs["phase"] == "tune"].groupby(_PLACE)))
    final = runs[runs["phase"] == "final"]
    chosen = [_chosen(found, trials.get(place)) for place, found in final.groupby(_PLACE, sort=False)]
    entries = []
    for (experiment, method), found in pd.concat(chosen).groupby(["experiment", "method"], sort=False):
        values = {task: group["accuracy"].tolist() for task, group in found.groupby("task")}
        samples = {task: Sample.of(values[task]) for task in HEADINGS if task in values}
        entries.append((MethodKey.parse(method), experiment, samples, tuple(_notes(found, samples))))
    names = [(key, notes) for key, _, _, notes in entries]
    ours = [Ours(*entry, names.count((entry[0], entry[3])) > 1) for entry in entries]
    order = list(METHODS)
    return sorted(ours, key=lambda entry: (order.index(entry.key.method), -(entry.key.rho or 0.0)))


def _chosen(final: pd.DataFrame, trials: pd.DataFrame | None) -> pd.DataFrame:
    """Final runs of one task, method and experiment that count, with a note on how their point was tuned."""
    if trials is None:
        notes = ["learning rate and rank as given, not chosen on val200"]
    else:
        by_point = trials.groupby("point", sort=False)
        scores = {point: [score(run) for run in found.to_dict("records")] for point, found in by_point}
        best = choose({point: scores[point] for point in final["point"].unique() if point in scores})
        if best is not None:
            final = final[final["point"] == best.point]
        notes = list(_grid_notes(final["method"].iloc[0], {point: len(found) for point, found in scores.items()}))
    for _, same in final.groupby("seed"):
        first, last = same.iloc[0], same.iloc[-1]
        for _, other in same.iterrows():
            if (first.point, first.accuracy) != (other.point, other.accuracy):
                raise InputError(
                    f"{first.place} and {last.place} are both {first.method} on {first.task} with seed {first.seed}, "
                    f"of {first.accuracy:.2f}% at {first.point} and {last.accuracy:.2f}% at {last.point}: keep one of "
                    "them"
                )
    final = final.drop_duplicates("seed")
    return final.assign(notes=[(*found, *notes) for found in final["notes"]])


def _grid_notes(method: str, seeds: Mapping[Point, int]) -> Iterable[str]:
    """A sentence where tuning did not go over the paper's grid and seeds; `seeds`: how many per point."""
    wanted, fewest = set(PAPER.points(MethodKey.parse(method).adapts)), min(seeds.values())
    if set(seeds) != wanted:
        yield f"learning rate and rank chosen among {len(seeds)} pairs that are not the paper's {len(wanted)}"
    elif fewest < len(PAPER.tune_seeds):
        yield (
            f"learning rate and rank chosen by {fewest} seed{'s' * (fewest != 1)} instead of the paper's "
            f"{len(PAPER.tune_seeds)}"
        )


def _notes(runs: pd.DataFrame, samples: Mapping[str, Sample]) -> Iterable[str]:
    """The notes of all `runs`, each with the tasks it concerns where these are not all."""
    tasks: dict[str, list[str]] = {}
    for task, notes in zip(runs["task"], runs["notes"], strict=True):
        for note in notes:
            tasks.setdefault(note, []).append(task)
    counts = sorted({sample.n for sample in samples.values()} - {SEEDS})
    if counts:
        few = [task for task in samples if samples[task].n != SEEDS]
        tasks[f"{' or '.join(map(str, counts))} seed{'s' * (counts != [1])} instead of {SEEDS}"] = few
    for note, concerned in tasks.items():
        where = [task for task in HEADINGS if task in concerned]
        yield note if len(where) == len(samples) else f"{note} (on {', '.join(where)})"
