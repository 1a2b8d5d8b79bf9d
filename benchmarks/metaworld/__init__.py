"""Speed of collection, data pipeline and rollouts: ``python -m benchmarks metaworld``.

Each part compares what the project does with the bare work inside it; :mod:`benchmarks.metaworld.collect`, ``data`` and
``rollout`` say how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.harness import BenchmarkSettings, Figures, measure_parts
from benchmarks.metaworld import collect, data, rollout
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option

PARTS: dict[str, Callable[[], Figures]] = {"collect": collect.measure, "data": data.measure, "rollout": rollout.measure}


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What to measure."""

    parts: tuple[str, ...] = option(tuple(PARTS), "what to measure", Role.SELECTION, choices=PARTS)
    environments: int = option(50, "environments of the rollouts", Role.SELECTION, at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)


def measure(settings: Settings) -> dict[str, Figures]:
    """Measure the parts; returns part -> name -> figure."""
    parts: dict[str, Callable[[], Figures]] = {
        **PARTS,
        "rollout": partial(rollout.measure, environments=settings.environments),
    }
    return measure_parts({part: parts[part] for part in settings.parts}, settings)


COMMAND = SettingsCommand(
    Settings,
    "python -m benchmarks metaworld",
    "Speed of collection, data pipeline and rollouts.",
    "benchmarks.metaworld:measure",
)
main, command_line = COMMAND.main, COMMAND.command_line
