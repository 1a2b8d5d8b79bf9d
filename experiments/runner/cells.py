"""What is tuned alone, for one choice of its own: a method, or a task and a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.runner.jobs import Job, Point
from experiments.runner.tuning import Choice


@dataclass
class Cell:
    """A unit that is tuned alone.

    Attributes:
        name: Tells it from the others.
        points: What to choose from. Grows where `extend` allows it.
        tune: The tuning runs of a point: as many for each.
        final: The final runs of the point chosen.
        also: More points that get final runs, by the choice.
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
    also: Callable[[Choice], list[Point]] | None = None

    def final_of(self, choice: Choice) -> list[Job]:
        """All final runs that follow from a choice: first those of its point."""
        points = [choice.point, *([] if self.also is None else self.also(choice))]
        return [job for point in dict.fromkeys(points) for job in self.final(point)]

    def __str__(self) -> str:
        return self.name
