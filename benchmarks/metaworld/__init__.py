"""Speed of collection, data pipeline and rollouts: ``python -m benchmarks metaworld``.

Each part compares what the project does with the bare work inside it; :mod:`benchmarks.metaworld.collect`, ``data`` and
``rollout`` say how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.harness import BenchmarkSettings, Figures, measure_parts
from benchmarks.metaworld import collect, data, rollout
from experiments.runner.cli import in_terminal
from experiments.runner.settings import Role, check_settings, option, parse_settings

PARTS: dict[str, Callable[[], Figures]] = {"collect": collect.measure, "data": data.measure, "rollout": rollout.measure}


@dataclass(frozen=True, kw_only=True)
class Settings(BenchmarkSettings):
    """What to measure."""

    parts: tuple[str, ...] = option(tuple(PARTS), "what to measure", Role.SELECTION, choices=PARTS)

    def __post_init__(self) -> None:
        check_settings(self)


def main(args: Sequence[str] | None = None) -> dict[str, Figures]:
    """Run the command line `args` (``sys.argv`` for None) and return part -> name -> figure.

    Raises:
        InputError: A setting is wrong.
    """
    description = "Speed of collection, data pipeline and rollouts."
    settings = parse_settings(Settings, "python -m benchmarks metaworld", description, args)
    return measure_parts({part: PARTS[part] for part in settings.parts}, settings)


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal; returns the exit status."""
    return in_terminal(main, args)
