"""The grid of a sweep: learning rates, ranks, ρ and seeds to tune over, how runs compare, which seeds follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError, MissingInputError, check_number, unknown
from experiments.runner.jobs import Point
from experiments.runner.yaml_files import read_yaml


@dataclass(frozen=True)
class Grid:
    """Learning rates x ranks (x ρ) x seeds on train800/val200, then final seeds on train800val200/test.

    The defaults are the paper's (section D.3): 5 x 4 x 3 tuning runs and 5 final runs per task and method, over 19
    tasks 1,140 and 95. For methods without a rank (linear, fft) the axis of ranks collapses: 5 x 3 tuning runs. EVA and
    EVA+DoRA are searched over ρ = 1 and ρ = 2 besides, and the better one is reported (section G): 2,280 tuning runs;
    where one ρ is asked for (``eva:1``) that axis collapses.

    Attributes:
        lrs: Peak learning rates.
        ranks: LoRA ranks; EVA's mean ranks.
        tune_seeds: Seeds of the tuning runs.
        final_seeds: Seeds of the final runs; empty to tune only.
        rhos: ρ, for methods that search it (``searches_rho`` of the method registry).

    Raises:
        InputError: An axis is empty, holds a value twice, or one that is out of range.
    """

    lrs: tuple[float, ...] = (2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    tune_seeds: tuple[int, ...] = (0, 1, 2)
    final_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rhos: tuple[float, ...] = (1.0, 2.0)

    def __post_init__(self) -> None:
        bounds: dict[str, dict[str, Any]] = {"lrs": {"above": 0}, "ranks": {"at_least": 1, "whole": True}}
        bounds["rhos"] = {"at_least": 1}
        for axis in fields(self):
            values = getattr(self, axis.name)
            if not values and axis.name != "final_seeds":
                raise InputError(f"{axis.name} of the grid must hold at least one value", setting=axis.name)
            for value in values:
                check_number(axis.name, value, **bounds.get(axis.name, {"at_least": 0, "whole": True}))
            if len(set(values)) < len(values):
                message = f"{axis.name} of the grid must differ, got {', '.join(map(str, values))}"
                raise InputError(message, setting=axis.name)

    def points(self, adapts: bool, searches_rho: bool = False) -> list[Point]:
        """The settings to choose from, for a method with a rank (`adapts`) or without, and with a ρ or without."""
        ranks: tuple[int | None, ...] = self.ranks if adapts else (None,)
        rhos: tuple[float | None, ...] = self.rhos if searches_rho else (None,)
        return [Point.of(lr=lr, rank=rank, rho=rho) for rho in rhos for lr in self.lrs for rank in ranks]

    def sizes(self, adapts: bool, searches_rho: bool = False) -> tuple[int, int]:
        """Tuning and final runs per task of such a method."""
        return len(self.points(adapts, searches_rho)) * len(self.tune_seeds), len(self.final_seeds)


PAPER = Grid()


#: What a tuning run can be judged by.
SELECTED_BY = ("accuracy", "loss")


def score(metrics: Mapping[str, Any], select: str = "accuracy") -> tuple[float, ...]:
    """How good a tuning run is, lower is better: by accuracy, then by loss; or the other way round.

    Accuracies of 200 images are multiples of 0.5%, so means are often equal (paper, section D.3, has accuracy alone). A
    loss that is no number (diverged) comes last.

    Args:
        metrics: Of the run.
        select: One of `SELECTED_BY`: what counts first.
    """
    loss = metrics.get("loss")
    by = {
        "accuracy": -float(metrics["accuracy"]),
        "loss": float(loss) if loss is not None and math.isfinite(loss) else math.inf,
    }
    return by[select], *(value for name, value in by.items() if name != select)


def load_grid(name: str, **axes: int | Sequence[float] | None) -> Grid:
    """The grid called `name` (``"paper"``), or that of a YAML file with any of the keys of :class:`Grid`.

    Args:
        name: Name or file.
        axes: Axes to have instead, where they are not None; of seeds also how many there are, from 0.

    Raises:
        MissingInputError: There is no such file.
        InputError: No such name, no mapping, unknown keys or values of the wrong kind.
    """
    given = {key: value for key, value in axes.items() if value is not None}
    document = {} if name == "paper" else _document(Path(name))
    return replace(PAPER, **{key: _axis(key, value) for key, value in {**document, **given}.items()})


def _document(file: Path) -> dict[str, Any]:
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"{unknown('grid', str(file), ['paper'])} (a grid of your own is a file name.yaml)")
    if not file.is_file():
        raise MissingInputError(f"grid file {file} does not exist")
    document = read_yaml(file)
    axes = [axis.name for axis in fields(Grid)]
    if not isinstance(document, dict) or not document:
        raise InputError(f"grid file {file} must be a mapping with any of {', '.join(axes)}")
    for key in document:
        if key not in axes:
            raise InputError(f"grid file {file}: {unknown('key', str(key), axes)}")
    return document


_MOST_SEEDS = 10_000


def _axis(key: str, value: Any) -> tuple[Any, ...]:
    """One axis from YAML: a list, a single value, or for seeds how many there are, from 0."""
    if key.endswith("seeds") and isinstance(value, int) and not isinstance(value, bool):
        check_number(key, value, at_least=0, at_most=_MOST_SEEDS, whole=True)
        return tuple(range(value))
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    # YAML 1.1 reads 1e-3 as a word
    return tuple(map(_number, values)) if key in ("lrs", "rhos") else values


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value
