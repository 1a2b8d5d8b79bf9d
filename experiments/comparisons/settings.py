"""What every comparison of methods is asked: which methods, how many seeds, which learning rates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eva_lightning.errors import InputError, check_number
from eva_lightning.methods import METHODS
from experiments.runner.cells import Cell
from experiments.runner.jobs import Job, Phase, Point
from experiments.runner.options import RunnerOptions
from experiments.runner.settings import Role, option

#: Learning rates that a grid may grow to.
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

#: Seeds of tuning runs start here, so that the comparison uses none of them.
FIRST_TUNING_SEED = 100


@dataclass(frozen=True)
class Part:
    """What is tuned alone: a method on all tasks, or on one, or at one rank.

    Attributes:
        method: Its key.
        task: The only one; None for all.
        rank: The only one; None where there is none, or where it is tuned.
        demonstrations: Their number, where several are compared.
    """

    method: str
    task: str | None = None
    rank: int | None = None
    demonstrations: int | None = None

    @property
    def name(self) -> str:
        """Tells it from the others."""
        rank = None if self.rank is None else f"rank {self.rank}"
        number = None if self.demonstrations is None else f"{self.demonstrations} demonstrations"
        return ", ".join(word for word in (self.task, self.method, rank, number) if word is not None)


@dataclass(frozen=True, kw_only=True)
class MethodSettings(RunnerOptions, ABC):
    """Settings of a comparison of methods, each at a learning rate tuned for it alone."""

    methods: tuple[str, ...] = option((), "methods, with EVA's ρ behind a colon where it is not 2", Role.SELECTION)
    seeds: int = option(5, "seeds per method, from 0", Role.SELECTION, at_least=1)
    rank: int = option(4, "LoRA rank; EVA's mean rank per layer, so that all share one budget", Role.RESULT, at_least=1)
    rates: dict[str, float] | None = option(
        None, "learning rates, as lora=0.01,eva:1=0.01,...; the others are tuned", Role.SELECTION
    )
    grid: tuple[float, ...] = option((), "learning rates to try first when tuning", Role.SELECTION, above=0)
    extend: int = option(
        0, "most learning rates to add per method, beyond an edge of the grid that came out best", Role.SELECTION,
        at_least=0,
    )  # fmt: skip
    tune_seeds: int = option(1, f"seeds of the tuning, from {FIRST_TUNING_SEED}", Role.SELECTION, at_least=1)
    workers: int | None = option(2, "runs at the same time; 0: in this process", Role.PLACE, at_least=0)
    threads: int | None = option(1, "CPU threads per run", Role.PLACE, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = list(self.labels)
        if not keys or len(keys) < len(self.methods):
            raise InputError(f"methods must be named, and differ, got {', '.join(self.methods)!r}", setting="methods")
        if not self.grid:
            raise InputError("grid must hold at least one learning rate", setting="grid")
        for key, lr in self.given_rates.items():
            check_number(f"the learning rate of {key}", lr, above=0)

    @property
    def uses_gpus(self) -> bool:
        """The networks are small: runs train on the CPU."""
        return False

    @abstractmethod
    def key_and_label(self, text: str) -> tuple[str, str]:
        """How a method is written in settings and in tables.

        Raises:
            InputError: There is no such method here; names the nearest.
        """

    @property
    def labels(self) -> dict[str, str]:
        """Key -> label of the methods, in the order of tables."""
        return dict(map(self.key_and_label, self.methods))

    @property
    def given_rates(self) -> dict[str, float]:
        """Learning rates by method, of those that are given."""
        return {self.key_and_label(text)[0]: lr for text, lr in (self.rates or {}).items()}

    @property
    def parts(self) -> list[Part]:
        """What is tuned alone, in the order of tables."""
        return [Part(key) for key in self.labels]

    def points(self, part: Part) -> list[Point]:
        """What to choose from; a learning rate that is given is the only one."""
        given = self.given_rates.get(part.method)
        return [Point.of(lr=lr) for lr in (sorted(set(self.grid)) if given is None else [given])]


def adapts(key: str) -> bool:
    """Whether a method has adapters, and so a rank."""
    name = key.partition(":")[0]
    return name in METHODS and METHODS[name].adapts


def method_cells(settings: MethodSettings, jobs: Callable[[Part, Phase, Point, int], Sequence[Job]]) -> list[Cell]:
    """One cell for each part, whose settings are tuned for it alone.

    Args:
        settings: What is compared.
        jobs: The runs of a part, phase, point and seed.
    """

    def cell(part: Part) -> Cell:
        def of(phase: Phase, first: int, seeds: int) -> Callable[[Point], list[Job]]:
            return lambda point: [job for seed in range(first, first + seeds) for job in jobs(part, phase, point, seed)]

        points = settings.points(part)
        # of several ranks the best is known by tuning alone, also at a learning rate that is given
        known = part.method in settings.given_rates and len(points) == 1 and part.rank is None
        return Cell(
            name=part.name,
            points=points,
            tune=of("tune", FIRST_TUNING_SEED, settings.tune_seeds),
            final=of("final", 0, settings.seeds),
            given=points[0] if known else None,
            extend=settings.extend,
            ladder=LADDER,
        )

    return [cell(part) for part in settings.parts]
