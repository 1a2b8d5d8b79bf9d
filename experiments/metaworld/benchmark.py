"""Speed of collection, data pipeline and rollouts: ``python -m experiments.metaworld benchmark``.

Each part compares what the project does with the bare work inside it, interleaved in the same run; the modules
``experiments.metaworld.benchmark_collect``, ``benchmark_data`` and ``benchmark_rollout`` say how.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from eva_lightning.errors import InputError, unknown
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings

PARTS = ("collect", "data", "rollout")


@dataclass(frozen=True)
class Settings:
    """What to measure, and where to write it."""

    parts: str = option(",".join(PARTS), "what to measure: collect, data, rollout, with commas between them")
    json: str | None = option(None, "also write the figures to this file, as JSON")

    def __post_init__(self) -> None:
        for part in self.selected:
            if part not in PARTS:
                raise InputError(unknown("part", part, PARTS))

    @property
    def selected(self) -> tuple[str, ...]:
        """The parts asked for."""
        return tuple(part.strip() for part in self.parts.split(","))


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = (__doc__ or "").splitlines()[0].rstrip(".")
    return parse_settings(Settings, "python -m experiments.metaworld benchmark", description, args)


def main(args: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the command line `args` (``sys.argv`` for None) and return part -> name -> figure.

    Raises:
        InputError: A setting is wrong.
    """
    settings = parse(args)
    results: dict[str, dict[str, float]] = {}
    targets: dict[str, Any] = {}
    for part in settings.selected:
        module = _module(part)
        print(f"measuring {part} ...", flush=True)
        results[part] = dict(module.measure())
        targets.update(getattr(module, "TARGETS", {}))
    _report(results, targets)
    if settings.json is not None:
        Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": _machine(), "figures": results}
        Path(settings.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return results


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


def _module(part: str) -> ModuleType:
    return importlib.import_module(f"experiments.metaworld.benchmark_{part}")


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"python": platform.python_version(), "system": platform.machine(), "cores": cores}


def _report(results: Mapping[str, Mapping[str, float]], targets: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"speed on {_machine()['cores']} core(s)")
    for name, justify in (("part", "left"), ("what", "left"), ("figure", "right"), ("target", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for part, figures in results.items():
        for name, value in figures.items():
            table.add_row(part, name, _number(value), _target(name, targets))
        table.add_section()
    Console().print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _target(name: str, targets: Mapping[str, Any]) -> str:
    """A bare number is a lower bound; text, such as ``"<= 1.03"``, speaks for itself."""
    if name not in targets:
        return ""
    target = targets[name]
    return target if isinstance(target, str) else f">= {target:g}"
