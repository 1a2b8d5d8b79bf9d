"""Our own results for the tables: final runs out of the results store and out of run folders, gathered by method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.methods.keys import METHOD_TRAITS, MethodKey
from eva_lightning.vision.data.tasks import TASKS
from experiments.runner.statistics import Sample
from experiments.vtab import run
from experiments.vtab.grid import PAPER, Point
from experiments.vtab.jobs import digest, experiment_settings
from experiments.vtab.store import ResultsStore
from experiments.vtab.table_paper import HEADINGS, SEEDS

#: Names of the model of the paper's tables.
PAPER_MODELS = ("dinov2_g14", "vit_giant_patch14_dinov2.lvd142m")

# settings that leave a result comparable with the paper's, or that are said in words of their own
_SILENT = ("accumulate", "precision", "model", "weights", "limit_train", "limit_test", "protocol")


@dataclass(frozen=True)
class RunResult:
    """A finished final run.

    Attributes:
        key: The method.
        experiment: Identity of all settings besides task, method, ρ, learning rate, rank and seed.
        model: Its name, as given.
        task, seed: What it was run on.
        accuracy: On the test set, in percent.
        point: Learning rate and rank.
        notes: Why the result cannot be compared with the paper's.
        place: Where it was found.
        tuned: Learning rate and rank were chosen on val200, not given.
    """

    key: MethodKey
    experiment: str
    model: str
    task: str
    seed: int
    accuracy: float
    point: Point
    notes: tuple[str, ...]
    place: str
    tuned: bool


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
        """The method as the paper writes it, with the experiment's identity where only that tells two entries apart."""
        return self.key.label + (f" #{self.experiment[:6]}" if self.is_ambiguous else "")

    @property
    def seeds(self) -> tuple[int, int]:
        """Fewest and most seeds of a task."""
        counts = [sample.n for sample in self.samples.values()]
        return min(counts), max(counts)


def read_store(path: str | Path) -> list[RunResult]:
    """The finished final runs of a results store; also while a sweep writes it.

    Raises:
        MissingInputError: There is no such file, or no final run is done; says what there is and what to run.
        InputError: It is no results store, or damaged.
    """
    store = ResultsStore(path)
    rows = store.rows(phase="final", status="done")
    if not rows:
        states = [row["status"] for phase in ("tune", "final") for row in store.rows(phase=phase, details=False)]
        progress = f" ({states.count('done')} of {len(states)} runs are done, none of them final)" if states else ""
        raise MissingInputError(
            f"no final run is done in the results store {path}{progress}: python -m experiments.vtab sweep --root DIR "
            "makes and continues it"
        )
    foreign = _foreign_grids(store)
    results = []
    for row in rows:
        point = Point(row["lr"], row["rank"])
        result = _result(row["method"], row["settings"], row["metrics"], point, f"row {row['run_id']} of {path}", True)
        grid = foreign.get((row["experiment"], row["method"], row["task"]))
        notes = (*result.notes, *([grid] if grid else []))
        if row["comparable"] is False and not notes:
            notes = ("marked as not comparable by the run",)
        results.append(replace(result, experiment=row["experiment"], notes=notes))
    return results


def read_folders(root: str | Path) -> list[RunResult]:
    """The finished runs below `root` that were tested on the test set, in order of their paths.

    Raises:
        MissingInputError: `root` is no folder, or there is none; says what to run.
        InputError: A file is damaged.
    """
    if not Path(root).is_dir():
        raise MissingInputError(f"the folder of runs {root} does not exist")
    results = []
    for file in sorted(Path(root).rglob("metrics.json")):
        metrics = _read(file, json.loads)
        if metrics.get("task") not in TASKS or metrics.get("method") not in METHOD_TRAITS:
            continue  # of another experiment
        if metrics.get("evaluation_split") != "test":
            continue  # tuning
        config = file.with_name("config.yaml")
        settings = _read(config, yaml.safe_load) if config.is_file() else metrics
        traits = METHOD_TRAITS[metrics["method"]]
        key = MethodKey(metrics["method"], metrics.get("rho") if traits.redistributes else None).key
        point = Point(metrics["lr"], metrics.get("rank"))
        results.append(_result(key, {"root": "", **settings}, metrics, point, str(file.parent), False))
    if not results:
        raise MissingInputError(
            f"no finished runs with a test accuracy below {root}: make one with "
            f"python -m experiments.vtab run --root DIR --task TASK --output {root}"
        )
    return results


def gather(results: Iterable[RunResult]) -> list[Ours]:
    """One entry per method and experiment, in the order of the methods' table; the same run found twice counts once.

    Raises:
        InputError: Two runs of the same task and seed differ in learning rate, rank or result: says where both are.
    """
    runs: dict[tuple[str, str, str, int], RunResult] = {}
    for result in results:
        place = result.experiment, result.key.key, result.task, result.seed
        known = runs.setdefault(place, result)
        if (known.point, known.accuracy) != (result.point, result.accuracy):
            raise InputError(
                f"{known.place} and {result.place} are both {result.key} on {result.task} with seed {result.seed}, of "
                f"{known.accuracy:.2f}% at {known.point} and {result.accuracy:.2f}% at {result.point}: keep one of them"
            )
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for result in runs.values():
        groups.setdefault((result.experiment, result.key.key), []).append(result)
    entries = [_gathered(experiment, found) for (experiment, _), found in groups.items()]
    names = [(entry.key, entry.notes) for entry in entries]
    entries = [replace(entry, is_ambiguous=names.count(name) > 1) for entry, name in zip(entries, names, strict=True)]
    order = list(METHOD_TRAITS)
    appearance = list(dict.fromkeys(entry.experiment for entry in entries))
    return sorted(
        entries,
        key=lambda e: (order.index(e.key.method), -(e.key.rho or 0.0), appearance.index(e.experiment)),
    )


def _gathered(experiment: str, runs: Sequence[RunResult]) -> Ours:
    samples = {
        task: Sample.of([result.accuracy for result in runs if result.task == task])
        for task in HEADINGS
        if any(result.task == task for result in runs)
    }
    notes: dict[str, list[str]] = {}
    for result in runs:
        for note in result.notes:
            tasks = notes.setdefault(note, [])
            if result.task not in tasks:
                tasks.append(result.task)
    if not all(result.tuned for result in runs):
        untuned = {result.task for result in runs if not result.tuned}
        notes["learning rate and rank as given, not chosen on val200"] = [t for t in HEADINGS if t in untuned]
    counts = sorted({sample.n for sample in samples.values()} - {SEEDS})
    if counts:
        few = [task for task in samples if samples[task].n != SEEDS]
        notes[f"{' or '.join(map(str, counts))} seed{'s' * (counts != [1])} instead of {SEEDS}"] = few
    return Ours(runs[0].key, experiment, samples, tuple(_where(note, t, samples) for note, t in notes.items()))


def _where(note: str, tasks: Sequence[str], samples: Mapping[str, Sample]) -> str:
    return note if len(tasks) == len(samples) else f"{note} (on {', '.join(tasks)})"


def _result(
    method: str, settings: Mapping[str, Any], metrics: Mapping[str, Any], point: Point, place: str, tuned: bool
) -> RunResult:
    known = {item.name for item in fields(run.Settings)}
    try:
        shared = experiment_settings(run.Settings(**{k: v for k, v in settings.items() if k in known}))
    except (TypeError, ValueError) as error:
        raise InputError(f"{place} has settings that no run has: {error}") from error
    return RunResult(
        key=MethodKey.parse(method),
        experiment=digest(shared),
        model=shared["model"],
        task=metrics["task"],
        seed=int(metrics["seed"]),
        accuracy=100 * float(metrics["accuracy"]),
        point=point,
        notes=tuple(_differences(shared, metrics)),
        place=place,
        tuned=tuned,
    )


def _differences(shared: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on what tells a run from the paper's."""
    notes = []
    if shared["model"] not in PAPER_MODELS:
        notes.append(f"model {shared['model']} instead of DINOv2-g/14")
    if shared["weights"] == "none":
        notes.append("random weights instead of pre-trained ones")
    elif shared["weights"] != "pretrained":
        notes.append(f"weights of the file {Path(str(shared['weights']).split(':')[0]).name}")
    if shared.get("protocol", "paper") != "paper":
        notes.append(f"protocol {shared['protocol']}, not the text of the paper")
    if metrics.get("limited"):
        notes.append("limited to a part of the data")
    elif not metrics.get("official_sizes", True):
        notes.append("data of other than the official sizes")
    defaults = experiment_settings(run.Settings("", next(iter(HEADINGS))))
    changed = [
        f"{name} {shared[name]} (default: {default})"
        for name, default in defaults.items()
        if name not in _SILENT and shared[name] != default
    ]
    if changed:
        notes.append(f"other settings than the defaults, which are the paper's: {', '.join(changed)}")
    return notes


def _foreign_grids(store: ResultsStore) -> dict[tuple[str, str, str], str]:
    """Experiment, method and task -> a sentence, where tuning did not go over the paper's grid and seeds."""
    seeds: dict[tuple[str, str, str], dict[Point, int]] = {}
    for row in store.rows(phase="tune", status="done", details=False):
        place, point = (row["experiment"], row["method"], row["task"]), Point(row["lr"], row["rank"])
        points = seeds.setdefault(place, {})
        points[point] = points.get(point, 0) + 1
    sentences = {}
    for place, found in seeds.items():
        wanted = set(PAPER.points(MethodKey.parse(place[1]).adapts))
        fewest = min(found.values())
        if set(found) == wanted and fewest < len(PAPER.tune_seeds):
            sentences[place] = (
                f"learning rate and rank chosen by {fewest} seed{'s' * (fewest != 1)} instead of the paper's "
                f"{len(PAPER.tune_seeds)}"
            )
        elif set(found) != wanted:
            sentences[place] = (
                f"learning rate and rank chosen among {len(found)} pairs that are not the paper's {len(wanted)}"
            )
    return sentences


def _read(file: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: it must hold a mapping, got {type(content).__name__}")
    return content
