"""A search over ranks and ρ besides learning rates: what is tuned over, for what a choice is made, and by what."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from eva_lightning.errors import InputError, check_number, unknown
from eva_lightning.methods import MethodKey
from experiments.comparisons.settings import MethodSettings, Part, adapts
from experiments.runner.jobs import Point
from experiments.runner.settings import Role, option

#: What tuning can choose by, and the metric that it is; the loss breaks ties.
SELECTED_BY = {"loss": None, "success": "success_rate", "final-success": "final_success_rate"}

SELECTION = Role.SELECTION


@dataclass(frozen=True, kw_only=True)
class SearchSettings(MethodSettings):
    """Settings of a comparison whose ranks and ρ may be tuned like learning rates, for each task and rank alone."""

    grids: dict[str, tuple[float, ...]] | None = option(
        None, "learning rates to tune over for single methods, as '{fft: [1e-4, 4e-4]}', instead of grid", SELECTION
    )
    ranks: tuple[int, ...] | None = option(None, "ranks to tune over; none: rank alone", SELECTION, at_least=1)
    rhos: tuple[float, ...] | None = option(
        None, "EVA's ρ to tune over, for methods named without one; none: 2", SELECTION, at_least=1
    )
    tune_per: tuple[str, ...] = option(
        (), "tune for each task, each rank, or both (task,rank) alone; not given: one choice per method", SELECTION,
        choices=("task", "rank"),
    )  # fmt: skip
    select: str = option(
        "loss", "tune by the validation loss, success (at any step), or final-success (at the last), ties by the loss",
        SELECTION, choices=SELECTED_BY,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ranks", "rhos"):
            check_axis(name, getattr(self, name))
        for method, lrs in self.method_grids.items():
            if method not in self.labels:
                raise InputError(f"grids: {unknown('method', method, self.labels)}", setting="grids")
            check_axis("grids", lrs)
        if "rank" in self.tune_per and not self.ranks:
            raise InputError("tune_per rank goes with ranks, which are not given", setting="tune_per")

    @property
    @abstractmethod
    def task_names(self) -> tuple[str, ...]:
        """All tasks."""

    @property
    def searches(self) -> bool:
        """Whether anything but one learning rate per method is tuned."""
        return bool(self.grids or self.ranks or self.rhos or self.tune_per)

    @property
    def method_grids(self) -> dict[str, tuple[float, ...]]:
        """Learning rates by method, of those that have their own."""
        return {self.key_and_label(text)[0]: tuple(lrs) for text, lrs in (self.grids or {}).items()}

    def key_and_label(self, text: str) -> tuple[str, str]:
        """A method; with its ρ where that is written and others are searched."""
        key = MethodKey.parse(text)
        if self.rhos and key.rho is not None and ":" in text:
            return f"{key.method}:{key.rho:.12g}", f"{key.entry.label} (ρ = {key.rho:g})"
        return key.key, key.entry.label if self.rhos else key.label

    def searches_rho(self, method: str) -> bool:
        """Whether the ρ of a method is tuned."""
        return bool(self.rhos) and ":" not in method and MethodKey.parse(method).rho is not None

    @property
    def parts(self) -> list[Part]:
        """What is tuned alone: each method, or each by task and rank where that is asked for."""
        tasks = self.task_names if "task" in self.tune_per else (None,)
        return [
            Part(method, task, rank) for method, task in product(self.labels, tasks) for rank in self._ranks_of(method)
        ]

    def _ranks_of(self, method: str) -> Sequence[int | None]:
        return sorted(self.ranks) if self.ranks and "rank" in self.tune_per and adapts(method) else (None,)

    def points(self, part: Part) -> list[Point]:
        """Learning rates x ranks x ρ, as far as the method has them."""
        given, method = self.given_rates.get(part.method), part.method
        lrs = sorted(set(self.method_grids.get(method, self.grid))) if given is None else [given]
        tunes_rank = self.ranks and part.rank is None and adapts(method)
        ranks: Sequence[Any] = sorted(self.ranks or ()) if tunes_rank else [None]
        rhos: Sequence[Any] = sorted(self.rhos or ()) if self.searches_rho(method) else [None]
        return [Point.of(lr=lr, rank=rank, rho=rho) for lr, rank, rho in product(lrs, ranks, rhos)]

    def rank_of(self, part: Part, point: Point) -> int:
        """The rank of a part's runs at a point."""
        return int(point.get("rank", self.rank if part.rank is None else part.rank))

    def rho_of(self, part: Part, point: Point) -> float | None:
        """The ρ of a part's runs at a point; None for methods that have none."""
        return point.get("rho", MethodKey.parse(part.method).rho)


def check_axis(name: str, values: Sequence[float] | None) -> None:
    """What is tuned or compared over must hold something, and each value once."""
    if values is not None and (not values or len(set(values)) < len(values)):
        given = ", ".join(f"{value:g}" for value in values) or "none"
        raise InputError(f"{name} must hold at least one value, and each once, got {given}", setting=name)
    if name == "grids":
        for value in values or ():
            check_number("grids", value, above=0)
