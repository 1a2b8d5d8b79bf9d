"""Our own results for the tables: finished runs out of run folders as one data frame, gathered by method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import digest
from eva_lightning.methods.registry import DEFAULT_RHO, METHODS, MethodKey
from eva_lightning.vision.protocol import PAPER as PAPER_PROTOCOL
from eva_lightning.vision.protocol import PROTOCOLS
from experiments.runner.jobs import Point
from experiments.runner.run_folder import metrics_below
from experiments.runner.settings import Role, identity, role_of
from experiments.runner.statistics import Sample
from experiments.runner.tuning import choose
from experiments.vtab.grid import PAPER, score
from experiments.vtab.run_list import read_list
from experiments.vtab.settings import Settings, weights_in_words
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
        rhos: Task -> the ρ that was chosen on val200; empty where there is only one, that of `key`.
        names_rho: Say ρ also where it is 2, as there is an entry of a chosen one.
        runs: The final runs that count, as :func:`read_runs` gives them, with the column ``edge``: whether the
            learning rate is the ``"lowest"`` or ``"highest"`` of those tuned over, or ``""``.
    """

    key: MethodKey
    experiment: str
    samples: Mapping[str, Sample]
    notes: tuple[str, ...]
    is_ambiguous: bool = False
    rhos: Mapping[str, float] = field(default_factory=dict)
    names_rho: bool = False
    runs: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The method as the paper writes it, with the experiment's identity if two entries are alike otherwise."""
        label = self.key.label
        if self.names_rho and self.key.rho == DEFAULT_RHO:
            label += f" (ρ = {self.key.rho:g})"
        return label + (f" #{self.experiment[:6]}" if self.is_ambiguous else "")


def read_runs(folders: Iterable[str | Path], select: str = "accuracy") -> pd.DataFrame:
    """The finished runs below `folders`, also while a sweep writes them: one row per run, in order of their paths.

    A run that is found twice is one.

    Args:
        folders: Outputs of sweeps and runs, or lists of runs (:mod:`experiments.vtab.run_list`).
        select: What tuning was judged by, as the sweep's option.

    Returns:
        Columns ``experiment`` (identity of the settings that are not one run's), ``model``, ``method`` (with its ρ),
        ``family`` (without), ``rho``, ``task``, ``phase`` (``"tune"`` or ``"final"``), ``seed``, ``point`` (learning
        rate and rank), ``lr``, ``accuracy`` (in percent), ``loss``, ``score`` (in tuning, lower is better), ``notes``
        (why it cannot be compared with the paper's), ``place`` (the folder), ``official`` (all images, of the official
        sizes), ``group`` (of tasks), ``train_images``, ``test_images``, ``epochs``, ``image_size``, ``weights``,
        ``seconds`` (of training and evaluation) and ``losses`` (by epoch, of the runs of a list; None where they are in
        the folder).

    Raises:
        MissingInputError: One of `folders` is none, or no final run is finished; says what to run.
        InputError: A file is damaged.
    """
    rows, places = [], [*map(Path, folders)]
    for folder in places:
        if folder.is_file():
            rows += read_list(folder, select)
            continue
        if not folder.is_dir():
            raise MissingInputError(
                f"the folder of runs {folder} does not exist: python -m experiments.vtab sweep --root DIR makes "
                "runs/vtab; other folders are named by --runs"
            )
        rows += [run_row(metrics, str(place), select) for place, metrics in metrics_below(folder) if _is_ours(metrics)]
    runs = pd.DataFrame(rows)
    if runs.empty or "final" not in set(runs["phase"]):
        progress = f" ({len(runs)} tuning runs are)" if len(runs) else ""
        raise MissingInputError(
            f"no final run is finished below {', '.join(map(str, places))}{progress}: python -m experiments.vtab "
            "sweep --root DIR makes and continues them"
        )
    # one that is in two of the places, or listed and in its folder
    return runs.drop_duplicates([*_PLACE, "phase", "seed", "point", "accuracy", "loss"], ignore_index=True)


def _is_ours(metrics: Mapping[str, Any]) -> bool:
    """Whether a run is one on VTAB-1K, or on another folder of images by the same commands."""
    images = metrics.get("task") in HEADINGS or metrics.get("group") == "other"
    known = images and metrics.get("method") in METHODS and "experiment" in metrics
    return known and metrics.get("evaluation_split") in _PHASES


def run_row(metrics: Mapping[str, Any], place: str, select: str = "accuracy") -> dict[str, Any]:
    """A row of the frame from what ``metrics.json`` in the folder `place` holds."""
    phase = _PHASES[metrics["evaluation_split"]]
    return {
        "experiment": digest(metrics["experiment"]),
        "model": metrics["model"],
        "method": MethodKey(metrics["method"], metrics.get("rho")).key,
        "family": metrics["method"],
        "rho": metrics.get("rho"),
        "task": metrics["task"],
        "phase": phase,
        "seed": int(metrics["seed"]),
        "point": Point.of(lr=metrics["lr"], rank=metrics.get("rank")),
        "accuracy": 100 * float(metrics["accuracy"]),
        "loss": float(metrics["loss"]),
        "score": score(metrics, select),
        "notes": tuple(_differences(metrics)) if phase == "final" else (),
        "place": place,
        "lr": float(metrics["lr"]),
        "official": bool(metrics.get("official_sizes", True)),
        "group": metrics.get("group", "other"),
        "train_images": metrics.get("train_images"),
        "test_images": metrics.get("evaluation_images"),
        **{name: metrics["experiment"].get(name) for name in ("epochs", "image_size", "weights")},
        "seconds": sum(float(metrics.get(f"{part}_seconds", math.nan)) for part in ("train", "evaluation")),
        "losses": None,
    }


def _differences(metrics: Mapping[str, Any]) -> Iterable[str]:
    """Sentences on what tells a run from the paper's, whose settings are the defaults."""
    settings = metrics["experiment"]
    protocol = str(settings.get("protocol", PAPER_PROTOCOL.name))
    usual = Settings(root="", task=next(iter(HEADINGS)), protocol=protocol if protocol in PROTOCOLS else "paper")
    defaults = identity(usual, Role.RESULT, without=Role.PER_RUN)
    # what a machine does in its own way keeps results comparable
    where = {item.name for item in fields(Settings) if Role.PLACE in role_of(item)}
    names = dict.fromkeys((*defaults, *settings))
    changed = {name: settings.get(name) for name in names if settings.get(name) != defaults.get(name)}
    model, weights, _ = (changed.pop(name, None) for name in ("model", "weights", "protocol"))
    if model not in (None, *PAPER_MODELS):
        yield f"model {model} instead of DINOv2-g/14"
    if weights == "none":
        yield "random weights instead of pre-trained ones"
    elif weights is not None:
        yield weights_in_words(str(weights))
    if protocol != PAPER_PROTOCOL.name:
        yield f"protocol {protocol}, not the text of the paper"
    if metrics.get("limited"):
        yield "limited to a part of the data"
    elif not metrics.get("official_sizes", True):
        yield "data of other than the official sizes"
    others = {k: v for k, v in changed.items() if k not in where and not k.startswith("limit_")}
    if others:
        words = ", ".join(f"{name} {value} (default: {defaults[name]})" for name, value in others.items())
        yield f"other settings than the defaults, which are the paper's: {words}"


def gather(runs: pd.DataFrame, each_rho: bool = False) -> list[Ours]:
    """One entry per method and experiment, in the order of the method registry; a run found twice counts once.

    Where there are final runs of several learning rates and ranks, as after a larger grid, those of the best tuning
    count. Where tuning went over several ρ, the ρ is chosen in the same way, task by task (paper, section G); where it
    did not, every ρ is an entry of its own.

    Args:
        runs: As :func:`read_runs` gives them.
        each_rho: Give entries of every ρ besides, each with its own best learning rate and rank. They have the tasks
            that there are final runs of: ``sweep --final-each-rho`` does those of the ρ that were not chosen.

    Raises:
        InputError: Two runs of the same task and seed differ in learning rate, rank or result: says where both are.
    """
    is_searched = _is_searched(runs)
    searched = runs[is_searched]
    searched = searched.assign(
        method=searched["family"],
        point=[point.replace(rho=rho) for point, rho in zip(searched["point"], searched["rho"], strict=True)],
    )
    better = _entries(searched, searched=True)
    apart = _entries(runs if each_rho else runs[~is_searched], searched=False)
    ours = [*better, *(_beside(entry, better) for entry in apart)]
    names = [(entry.label, entry.notes) for entry in ours]
    ours = [replace(e, is_ambiguous=names.count(name) > 1) for e, name in zip(ours, names, strict=True)]
    order = list(METHODS)
    return sorted(ours, key=lambda e: (order.index(e.key.method), not e.rhos, -(e.key.rho or 0.0)))


def _is_searched(runs: pd.DataFrame) -> pd.Series[bool]:
    """Of each run, whether its method was tuned over several ρ on its task."""
    place = ["experiment", "family", "task"]
    counts = runs[runs["phase"] == "tune"].groupby(place)["rho"].nunique()
    return pd.Series([counts.get(key, 0) > 1 for key in zip(*(runs[name] for name in place), strict=True)], runs.index)


def _beside(entry: Ours, better: Sequence[Ours]) -> Ours:
    """An entry of one ρ, beside that of the chosen one."""
    for other in better:
        if (other.key.method, other.experiment) == (entry.key.method, entry.experiment):
            lacking = [task for task in other.samples if task not in entry.samples]
            note = f"no final runs on {', '.join(lacking)}: another ρ was chosen (sweep --final-each-rho does them)"
            return replace(entry, names_rho=True, notes=(*entry.notes, *([note] if lacking else [])))
    return entry


def _entries(runs: pd.DataFrame, searched: bool) -> list[Ours]:
    trials = dict(list(runs[runs["phase"] == "tune"].groupby(_PLACE)))
    final = runs[runs["phase"] == "final"]
    chosen = [_chosen(found, trials.get(place)) for place, found in final.groupby(_PLACE, sort=False)]
    entries = []
    for (experiment, method), found in (
        pd.concat(chosen).groupby(["experiment", "method"], sort=False) if chosen else ()
    ):
        values = {task: group["accuracy"].tolist() for task, group in found.groupby("task")}
        samples = {task: Sample.of(values[task]) for task in _in_order(values)}
        rhos = {str(task): float(group["rho"].iloc[0]) for task, group in found.groupby("task")} if searched else {}
        key = MethodKey.parse(method)
        entries.append(Ours(key, experiment, samples, tuple(_notes(found, samples)), rhos=rhos, runs=found))
    return entries


def _chosen(final: pd.DataFrame, trials: pd.DataFrame | None) -> pd.DataFrame:
    """Final runs of one task, method and experiment that count, with a note on how their point was tuned."""
    edge = ""
    if trials is None:
        notes = ["learning rate and rank as given, not chosen on val200"]
    else:
        by_point = trials.groupby("point", sort=False)
        scores = {point: found["score"].tolist() for point, found in by_point}
        best = choose({point: scores[point] for point in final["point"].unique() if point in scores})
        if best is not None:
            final = final[final["point"] == best.point]
        notes = list(_grid_notes(final["method"].iloc[0], {point: len(found) for point, found in scores.items()}))
        most = max(map(len, scores.values()))
        first = choose(scores, most)
        if best is not None and first is not None and first.score < best.score:
            notes.append(f"tuning prefers {first.point}, of which no final run is finished")
        rates, lr = sorted({point.get("lr") for point in scores}), final["lr"].iloc[0]
        if len(rates) > 1:
            edge = "lowest" if lr == rates[0] else "highest" if lr == rates[-1] else ""
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
    return final.assign(notes=[(*found, *notes) for found in final["notes"]], edge=edge)


def _in_order(tasks: Iterable[str]) -> list[str]:
    """VTAB-1K's in the order of the paper's columns, then other folders by name, each once."""
    found = set(tasks)
    return [*(task for task in HEADINGS if task in found), *sorted(found - HEADINGS.keys())]


def _grid_notes(method: str, seeds: Mapping[Point, int]) -> Iterable[str]:
    """A sentence where tuning did not go over the paper's grid and seeds; `seeds`: how many per point."""
    key, searched = MethodKey.parse(method), any(point.get("rho") is not None for point in seeds)
    what, sets = ("learning rate, rank and ρ", "sets") if searched else ("learning rate and rank", "pairs")
    wanted, fewest = set(PAPER.points(key.adapts, searched)), min(seeds.values())
    if set(seeds) != wanted:
        yield f"{what} chosen among {len(seeds)} {sets} that are not the paper's {len(wanted)}"
    elif fewest < len(PAPER.tune_seeds):
        yield f"{what} chosen by {fewest} seed{'s' * (fewest != 1)} instead of the paper's {len(PAPER.tune_seeds)}"
    if key.entry.searches_rho and not searched and key.rho == DEFAULT_RHO:
        yield "ρ = 2 alone, where the paper takes the better of 1 and 2"


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
        where = _in_order(concerned)
        yield note if len(where) == len(samples) else f"{note} (on {', '.join(where)})"
