"""Collect demonstrations, print what they are worth, and export them to Minari."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from eva_lightning.rl.collection import collect
from eva_lightning.rl.demonstrations import DemonstrationIndex
from experiments.metaworld.collect import Settings
from experiments.metaworld.demonstration_table import show_demonstrations


def run(settings: Settings) -> DemonstrationIndex:
    """Collect, report, export."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    began = time.perf_counter()
    index = collect(
        settings.tasks,
        settings.episodes,
        settings.out,
        noise=settings.noise,
        seed=settings.seed,
        workers=settings.workers,
        horizon=settings.horizon,
        progress=settings.progress,
    )
    _report(index, settings.tasks, time.perf_counter() - began)
    if settings.minari:
        from eva_lightning.rl.minari_export import export_minari  # an extra of its own size, which few ask for

        path = Path(settings.out) / "minari" if settings.minari_path is None else Path(settings.minari_path)
        names = export_minari(index, settings.tasks, path, progress=settings.progress)
        print(f'Minari: MINARI_DATASETS_PATH={path} python -c "import minari; minari.load_dataset({names[0]!r})"')
    return index


def _report(index: DemonstrationIndex, tasks: Sequence[str], seconds: float) -> None:
    show_demonstrations(index, tasks)
    first = index[tasks[0]]
    Console().print(
        f"{index.folder}: noise {first.noise:g}, seed {first.seed}, horizon {first.horizon}; {seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
