"""Finished runs out of folders: what each was asked to do, what came out, and in a sentence why a folder has none."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from eva_lightning.errors import InputError
from eva_lightning.files import with_numbers
from eva_lightning.methods import MethodKey
from eva_lightning.names import shown
from eva_lightning.reading import reading
from eva_lightning.sealed import read_sealed_json
from experiments.metaworld import finetune, pretrain
from experiments.runner.run_folder import runs_below
from experiments.runner.settings import Role, role_of
from experiments.runner.yaml_files import read_yaml
from experiments.vtab.settings import Settings as ImageSettings

#: Settings that say where and how fast, of all commands.
_PLACES = {
    item.name
    for kind in (ImageSettings, finetune.Settings, pretrain.Settings)
    for item in fields(kind)
    if role_of(item) in (Role.PLACE, Role.SELECTION)
}
#: Settings that are columns of their own, or the seed.
_APART = {"task", "tasks", "method", "rho", "seed", "seeds", "first_seed", "evaluated", "evaluate_on", "val_at",
          "noted_updates"}  # fmt: skip

Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class FoundRun:
    """A finished run.

    Attributes:
        folder: Where it is.
        task: What it was trained on.
        judged_on: The part of the task's images that its accuracy and loss are of; empty where none is named.
        method: Key of the method; a word of its own where it is none of the registry's.
        seed: Its seed.
        settings: What may tell it from runs of the same method, task and seed.
        values: Measure -> value: ``accuracy`` (%), ``loss``, ``val_loss``, ``success_rate``, ``final_success_rate``,
            ``mean_return``, ``trainable_parameters``, ``train_seconds``; as far as there are any.
        curves: What is drawn -> points: (epochs or steps, loss).
        ranks: Layer -> rank, where the method chose them.
        notes: What to know of it, such as that it diverged.
        metrics: All that it noted.
    """

    folder: Path
    task: str
    judged_on: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    values: Mapping[str, float]
    curves: Mapping[str, Curve]
    ranks: Mapping[str, int]
    notes: tuple[str, ...]
    metrics: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The method as reports print it."""
        try:
            return MethodKey.parse(self.method).label
        except InputError:
            return self.method

    @property
    def is_of_images(self) -> bool:
        """Else it is of robots."""
        return "accuracy" in self.values

    @property
    def weights(self) -> str:
        """What the weights were when it ran, as its identity has it, else as its settings do; empty where none do."""
        noted = self.metrics.get("experiment")
        known = noted if isinstance(noted, Mapping) and noted.get("weights") else self.settings
        return str(known.get("weights") or "")

    @property
    def has_diverged(self) -> bool:
        """Whether its loss or weights were NaN or infinite."""
        return bool(self.metrics.get("diverged"))


@dataclass(frozen=True)
class Found:
    """Finished runs, and a sentence on each folder that is left out."""

    runs: tuple[FoundRun, ...]
    left_out: tuple[str, ...]


def find_runs(folders: Sequence[str]) -> Found:
    """The finished runs in `folders` or below them, each once."""
    runs: dict[Path, FoundRun] = {}
    left_out: dict[str, None] = {}
    for name in folders:
        places, why = _places(Path(name))
        left_out |= dict.fromkeys(why)
        for place in places:
            try:
                runs.setdefault(place.resolve(), read_run(place))
            except InputError as error:
                left_out[str(error)] = None
    return Found(tuple(runs.values()), tuple(left_out))


def _places(folder: Path) -> tuple[list[Path], list[str]]:
    """The folders of runs in `folder` or below it; else a sentence that there are none."""
    if not folder.exists():
        return [], [f"{folder} does not exist"]
    if not folder.is_dir():
        return [], [f"{folder} is a file, and the folder of a run is needed"]
    places = list(runs_below(folder))
    return places, [] if places else [f"{folder} holds no run of this project (no config.yaml that one has written)"]


def read_run(folder: Path) -> FoundRun:
    """A finished run.

    Raises:
        InputError: It is unfinished, failed, damaged, or a run without measures that a report shows.
    """
    metrics = _metrics(folder)
    settings = read_yaml(folder / "config.yaml", "run it again")
    if not isinstance(settings, dict):
        raise InputError(f"{folder / 'config.yaml'} is damaged (no mapping in it): run it again")
    with reading(folder / "metrics.json", "run it again"):
        values = dict(_values(metrics))
        method, seed, ranks = _method(settings, metrics), _seed(settings, metrics), _ranks(metrics)
        task, curves, told_apart = _task(settings, metrics), dict(_noted_curves(metrics)), _told_apart(settings, method)
    if not values.keys() & {"accuracy", "val_loss", "success_rate"}:
        raise InputError(f"{folder} is a run of another kind: it has no accuracy, validation loss or success")
    curves = curves or dict(_curves_of(folder / "metrics.csv"))
    judged_on = str(metrics.get("evaluation_split") or settings.get("evaluate_on") or "")
    return FoundRun(folder, task, judged_on, method, seed, told_apart, values, curves, ranks,
                    tuple(_notes(metrics)), metrics)  # fmt: skip


def _metrics(folder: Path) -> dict[str, Any]:
    if (folder / "metrics.json").is_file():
        found: dict[str, Any] = with_numbers(read_sealed_json(folder / "metrics.json"))
        return found
    error = folder / "error.txt"
    if not error.is_file():
        raise InputError(f"{folder} is not finished: run it again to resume it")
    lines = error.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise InputError(f"{folder} has failed ({shown(lines[-1], 160)[1:-1] if lines else 'no traceback'})")


def _values(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Measures as numbers; of lists over epochs or evaluations the last."""
    evaluations = metrics.get("evaluations")
    last = evaluations[-1] if isinstance(evaluations, list) and evaluations else {}
    noted = {**metrics, **{name: last[name] for name in ("accuracy", "loss") if name in last}}
    if isinstance(noted.get("val_loss"), list):
        noted["val_loss"] = noted["val_loss"][-1]["val_loss"]
    names = ("accuracy", "loss", "val_loss", "success_rate", "final_success_rate", "mean_return",
             "trainable_parameters", "train_seconds")  # fmt: skip
    for name in names:
        value = noted.get(name)
        value = value[-1] if isinstance(value, list) and value else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value) * (100 if name == "accuracy" else 1)


def _method(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    name = str(metrics.get("method") or settings.get("method") or "pre-trained")
    rho = metrics.get("rho") if "rho" in metrics else None
    try:
        return MethodKey(name, rho).key if rho is not None else MethodKey.parse(name).key
    except InputError:
        return name


def _seed(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> int:
    given = (metrics.get("seed"), settings.get("seed"), settings.get("first_seed"), 0)
    return int(next(seed for seed in given if seed is not None))


def _task(settings: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    task = metrics.get("task") or settings.get("task") or metrics.get("tasks") or "task not named"
    if isinstance(task, list):
        return str(task[0]) if len(task) == 1 else f"{len(task)} tasks"
    return str(task)


def _ranks(metrics: Mapping[str, Any]) -> dict[str, int]:
    inside = metrics.get("eva")
    ranks = metrics.get("ranks") or (inside.get("ranks") if isinstance(inside, Mapping) else None) or {}
    return {str(layer): int(rank) for layer, rank in ranks.items()}


def _noted_curves(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Curve]]:
    """Curves that the metrics hold."""
    if isinstance(metrics.get("val_loss"), list):
        yield "validation loss", tuple((float(e["updates"]), float(e["val_loss"])) for e in metrics["val_loss"])
    if isinstance(metrics.get("evaluations"), list):
        yield "held-out loss", tuple((float(e["epoch"]), float(e["loss"])) for e in metrics["evaluations"])
    elif isinstance(metrics.get("loss"), list):
        losses = [float(loss) for loss in metrics["loss"]]
        epochs = metrics.get("epochs") or range(1, 1 + len(losses))
        yield "held-out loss", tuple(zip(map(float, epochs), losses, strict=True))


def _curves_of(file: Path) -> Iterator[tuple[str, Curve]]:
    """Curves of a ``metrics.csv`` with a row per epoch or validation; none where it is missing."""
    if not file.is_file():
        return
    with reading(file, "delete it"):
        rows = pd.read_csv(file)
        when = next(name for name in ("epoch", "step") if name in rows)
        found = {name: rows[[when, name]].astype(float) for name in ("train_loss", "val_loss") if name in rows}
    for column, name in (("train_loss", "training loss"), ("val_loss", "validation loss")):
        points = tuple(found[column].dropna().itertuples(index=False, name=None)) if column in found else ()
        if points:
            yield name, points


def _told_apart(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Settings that may differ between runs of a method, without what a method does not read."""
    try:
        adapts = MethodKey.parse(method).adapts
    except InputError:
        adapts = True
    ignored = {*_PLACES, *_APART, *(() if adapts else ("rank", "alpha"))}
    # what is fitted without a learning rate notes 0
    found = {str(name): value for name, value in settings.items() if name not in ignored and (name != "lr" or value)}
    # as JSON has it, whatever somebody has written into the file
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str, skipkeys=True))
    return plain


def _notes(metrics: Mapping[str, Any]) -> Iterator[str]:
    if metrics.get("diverged"):
        yield "diverged"
    elif any(isinstance(value, float) and not math.isfinite(value) for value in metrics.values()):
        yield "has values that are not finite"
    if metrics.get("limited"):
        yield "limited to a part of the data"
    warnings = metrics.get("warnings")
    yield from map(str, warnings if isinstance(warnings, list) else ())
