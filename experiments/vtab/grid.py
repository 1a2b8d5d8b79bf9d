"""The grid of a sweep: which learning rates, ranks and seeds are tuned over, how one is chosen, which seeds follow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from eva_lightning.errors import InputError, MissingInputError, unknown


@dataclass(frozen=True)
class Grid:
    """Learning rates x ranks x seeds on train800/val200, then final seeds on train800val200/test.

    The defaults are the paper's (section D.3): 5 x 4 x 3 tuning runs and 5 final runs per task and method, over 19
    tasks 1,140 and 95. For methods without a rank (linear, fft) the axis of ranks collapses: 5 x 3 tuning runs.

    Attributes:
        lrs: Peak learning rates.
        ranks: LoRA ranks; EVA's mean ranks.
        tune_seeds: Seeds of the tuning runs.
        final_seeds: Seeds of the final runs; empty to tune only.

    Raises:
        InputError: An axis is empty, holds a value twice, or one that is out of range.
    """

    lrs: tuple[float, ...] = (2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    tune_seeds: tuple[int, ...] = (0, 1, 2)
    final_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        for axis in fields(self):
            values = getattr(self, axis.name)
            if not values and axis.name != "final_seeds":
                raise InputError(f"{axis.name} of the grid must hold at least one value")
            if len(set(values)) < len(values):
                raise InputError(f"{axis.name} of the grid must differ, got {', '.join(map(str, values))}")
        for lr in self.lrs:
            if not 0 < lr < math.inf:
                raise InputError(f"lrs of the grid must be numbers above 0, got {lr}")
        for rank in self.ranks:
            if rank < 1:
                raise InputError(f"ranks of the grid must be at least 1, got {rank}")
        for seed in (*self.tune_seeds, *self.final_seeds):
            if seed < 0:
                raise InputError(f"seeds of the grid must be at least 0, got {seed}")

    def points(self, adapts: bool) -> list[Point]:
        """The settings to choose from, for a method with a rank (`adapts`) or without."""
        ranks: Sequence[int | None] = self.ranks if adapts else (None,)
        return [Point(lr, rank) for lr in self.lrs for rank in ranks]

    def sizes(self, adapts: bool) -> tuple[int, int]:
        """Tuning and final runs per task of a method with a rank (`adapts`) or without."""
        return len(self.points(adapts)) * len(self.tune_seeds), len(self.final_seeds)


@dataclass(frozen=True)
class Point:
    """A learning rate and, for methods that have one, a rank."""

    lr: float
    rank: int | None

    def __str__(self) -> str:
        return f"lr {self.lr:g}" + ("" if self.rank is None else f", r {self.rank}")


PAPER = Grid()


def load_grid(name: str) -> Grid:
    """The grid called `name` (``"paper"``), or that of a YAML file with any of the keys of :class:`Grid`.

    Raises:
        MissingInputError: There is no such file.
        InputError: No such name, no mapping, unknown keys or values of the wrong kind.
    """
    if name == "paper":
        return PAPER
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"{unknown('grid', name, ['paper'])} (a grid of your own is a file name.yaml)")
    if not file.is_file():
        raise MissingInputError(f"grid file {file} does not exist")
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"grid file {file} is no YAML: {' '.join(str(error).split())}") from None
    axes = [axis.name for axis in fields(Grid)]
    if not isinstance(document, dict) or not document:
        raise InputError(f"grid file {file} must be a mapping with any of {', '.join(axes)}")
    for key in document:
        if key not in axes:
            raise InputError(f"grid file {file}: {unknown('key', str(key), axes)}")
    return replace(PAPER, **{key: _axis(key, value, str(file)) for key, value in document.items()})


def override(grid: Grid, **axes: str | None) -> Grid:
    """`grid` with the axes that are given in a command's words: ``lrs="1e-3,5e-4"``, ``tune_seeds="3"``."""
    given = {key: value for key, value in axes.items() if value is not None}
    return replace(grid, **{key: _axis(key, _words(value), "the command line") for key, value in given.items()})


def _words(text: str) -> Any:
    words = [yaml.safe_load(word) for word in text.split(",") if word.strip()]
    return words[0] if len(words) == 1 and "," not in text else words


def _axis(key: str, value: Any, where: str) -> tuple[Any, ...]:
    """One axis from YAML: a list, a single value, or for seeds how many there are, from 0."""
    seeds = key.endswith("seeds")
    if seeds and isinstance(value, int) and not isinstance(value, bool):
        return tuple(range(value))
    values = value if isinstance(value, list) else [value]
    kind = float if key == "lrs" else int
    try:
        # YAML 1.1 reads 1e-3 as a word
        converted = tuple(kind(item) for item in values)
        if kind is int and any(isinstance(item, bool) or float(item) != int(item) for item in values):
            raise ValueError
    except (TypeError, ValueError):
        expected = "numbers" if key == "lrs" else "whole numbers"
        more = " (or how many there are)" if seeds else ""
        raise InputError(f"{where}: {key} must be {expected}{more}, got {value!r}") from None
    return converted


@dataclass(frozen=True)
class Choice:
    """What tuning came to: the `point` chosen, and per point the mean validation accuracy over the seeds."""

    point: Point
    accuracy: float
    candidates: Mapping[Point, float]


def choose(rows: Iterable[Mapping[str, Any]], points: Sequence[Point], n_seeds: int) -> Choice | None:
    """The learning rate and rank of the best mean validation accuracy over the seeds (paper, section D.3).

    Accuracies of 200 images are multiples of 0.5%, so means are often equal. Then the lower mean validation loss
    counts, after it the smaller rank, then the smaller learning rate; a loss that is no number (diverged) comes last.

    Args:
        rows: Rows of tuning runs of one task and method; those that are not done are passed over.
        points: What to choose from.
        n_seeds: Seeds per point; a point with fewer finished runs is not chosen.

    Returns:
        The choice, or None where no point has all its runs.
    """
    runs: dict[Point, list[Mapping[str, Any]]] = {point: [] for point in points}
    for row in rows:
        point = Point(row["lr"], row["rank"])
        if row["status"] == "done" and point in runs:
            runs[point].append(row)
    means: dict[Point, tuple[float, float]] = {}
    for point, found in runs.items():
        if len(found) == n_seeds:
            losses = [math.inf if row["loss"] is None else float(row["loss"]) for row in found]
            # fsum: the mean must not depend on the order in which runs came in
            accuracy = math.fsum(row["accuracy"] for row in found) / n_seeds
            means[point] = (accuracy, statistics.fmean(losses))
    if not means:
        return None
    # float means of equal accuracies in another order are equal to the last bits, not always to the last
    best = min(means, key=lambda p: (-round(means[p][0], 12), means[p][1], p.rank or 0, p.lr))
    return Choice(best, means[best][0], {point: accuracy for point, (accuracy, _) in means.items()})
