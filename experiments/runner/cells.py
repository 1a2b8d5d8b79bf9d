"""What is tuned alone, for one choice of its own: a method, or a task and a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.runner.jobs import Job, Point


@dataclass
class Cell:
    """A unit that is tuned alone.

    Attributes:
        name: Tells it from the others.
        points: What to choose from. Grows where `extend` allows it.
        tune: The tuning runs of a point: as many for each.
        final: The final runs of the point chosen.
        given: The point, where it need not be tuned.
        extend: How often the grid may grow by a learning rate beyond an edge that came out best.
        ladder: The learning rates it may grow to.
    """

    name: str
    points: list[Point]
    tune: Callable[[Point], list[Job]]
    final: Callable[[Point], list[Job]]
    given: Point | None = None
    extend: int = 0
    ladder: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.name
