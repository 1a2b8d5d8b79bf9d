"""Speed of the data pipeline and of training: ``python -m experiments.vtab benchmark [--root DIR]``.

Each part compares what the project does with the bare work inside it, interleaved in the same run; the modules
``experiments.vtab.benchmark_train``, ``benchmark_data`` and ``benchmark_gpu`` say how. The last one needs a CUDA GPU
and is left out where there is none.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError, unknown
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings

PARTS = ("train", "data", "gpu")

Figures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What to measure, on which images, and where to write it."""

    root: str | None = option(None, "folder that holds the VTAB-1K task folders; made-up images if not given")
    task: str = option("caltech101", "task, with --root")
    parts: str = option(",".join(PARTS), "what to measure: train, data, gpu, with commas between them")
    model: str = option("vit_tiny_patch16_224", "timm name of the model to time training with, on random weights")
    repeats: int = option(7, "timed epochs of each kind")
    json: str | None = option(None, "also write the figures to this file, as JSON")

    def __post_init__(self) -> None:
        for part in self.selected:
            if part not in PARTS:
                raise InputError(unknown("part", part, PARTS))
        if self.repeats < 1:
            raise InputError(f"repeats must be at least 1, got {self.repeats}")

    @property
    def selected(self) -> tuple[str, ...]:
        """The parts asked for."""
        return tuple(part.strip() for part in self.parts.split(","))


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = (__doc__ or "").splitlines()[0].split(":")[0]
    return parse_settings(Settings, "python -m experiments.vtab benchmark", description, args)


def main(args: Sequence[str] | None = None) -> dict[str, Figures]:
    """Run the command line `args` (``sys.argv`` for None) and return part -> name -> figure, of the parts that ran.

    Raises:
        MissingInputError: Something of the images is missing.
        InputError: A setting is wrong.
    """
    settings = parse(args)
    if settings.root is not None:
        from eva_lightning.vision.data.splits import open_task

        open_task(settings.root, settings.task)
    if "train" in settings.selected:
        from eva_lightning.vision.backbone.timm_models import resolve_model

        resolve_model(settings.model)
    results: dict[str, Figures] = {}
    targets: dict[str, str] = {}
    not_run: dict[str, str] = {}
    for part in settings.selected:
        module = importlib.import_module(f"experiments.vtab.benchmark_{part}")
        reason = getattr(module, "why_not", _nothing)()
        if reason is not None:
            not_run[part] = reason
            continue
        print(f"measuring {part} ...", flush=True)
        results[part] = module.measure(settings)
        targets |= module.TARGETS
    _report(results, targets, not_run)
    if settings.json is not None:
        file = Path(settings.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine(), "images": settings.root or "made up", "figures": results, "not_run": not_run}
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return results


def _nothing() -> str | None:
    return None


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.machine(),
        "cores": cores,
        "gpu": gpu,
    }


def _report(results: Mapping[str, Figures], targets: Mapping[str, str], not_run: Mapping[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if results:
        found = machine()
        table = Table(title=f"speed on {found['gpu'] or ''}{' and ' if found['gpu'] else ''}{found['cores']} core(s)")
        for name, justify in (("part", "left"), ("what", "left"), ("figure", "right"), ("target", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for part, figures in results.items():
            for name, value in figures.items():
                table.add_row(part, name, _number(value), targets.get(name, ""))
            table.add_section()
        console.print(table)
    for part, reason in not_run.items():
        console.print(f"{part}: not run, {reason}", highlight=False)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
