"""Collect demonstrations: ``python -m experiments.metaworld collect --tasks cw10 --episodes 100``.

Interrupted, it continues where it stopped when it is run again; with more episodes, it adds those that are missing.
Files, and the index beside them, are described in ``eva_lightning.rl.demonstrations``.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eva_lightning.rl.tasks import parse_tasks
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings

if TYPE_CHECKING:
    from eva_lightning.rl.demonstrations import DemonstrationIndex


@dataclass(frozen=True)
class Settings:
    """Everything one collection is asked to do."""

    tasks: str = option("mt40", "mt40, cw10, or task names with commas between them, such as push-v3,reach-v3")
    episodes: int = option(100, "episodes per task; a task that has more keeps them")
    noise: float = option(0.1, "standard deviation of the Gaussian noise on the expert's action, which is in [-1, 1]")
    seed: int = option(0, "seed of goals and noise")
    horizon: int = option(200, "steps per episode, at most 500")
    workers: int = option(1, "processes; the result does not depend on it")
    out: str = option("data/metaworld", "folder for one file per task and index.json")
    minari: bool = option(False, "also export Minari data sets, named metaworld/push/expert-v0 and so on")
    minari_path: str | None = option(None, "folder for them (MINARI_DATASETS_PATH); OUT/minari if not given")
    progress: bool = option(True, "show a progress bar")


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    return parse_settings(
        Settings, "python -m experiments.metaworld collect", (__doc__ or "").splitlines()[0].rstrip("."), args
    )


def main(args: Sequence[str] | None = None) -> DemonstrationIndex:
    """Run the command line `args` (``sys.argv`` for None) and return the index of the folder.

    Raises:
        InputError: A setting is wrong, or the folder holds demonstrations of another noise, seed or horizon.
        RuntimeError: A process ended unexpectedly; what was finished is kept.
    """
    settings = parse(args)
    tasks = parse_tasks(settings.tasks)

    from eva_lightning.rl.collection import collect

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    began = time.perf_counter()
    index = collect(
        tasks,
        settings.episodes,
        settings.out,
        noise=settings.noise,
        seed=settings.seed,
        workers=settings.workers,
        horizon=settings.horizon,
        progress=settings.progress,
    )
    _report(index, tasks, time.perf_counter() - began)
    if settings.minari:
        from eva_lightning.rl.minari_export import export_minari

        path = Path(settings.minari_path) if settings.minari_path is not None else Path(settings.out) / "minari"
        names = export_minari(index, tasks, path, progress=settings.progress)
        print(f'Minari: MINARI_DATASETS_PATH={path} python -c "import minari; minari.load_dataset({names[0]!r})"')
    return index


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error where the input is wrong (exit status 2), a process
    or the disk fails (1), or the user interrupts (130)."""
    try:
        return in_terminal(main, args)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: finished episodes are kept, the same command continues", file=sys.stderr)
        return 130


def _report(index: DemonstrationIndex, tasks: Sequence[str], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="success: share of the episodes solved at any step")
    table.add_column("task")
    for name in ("episodes", "success", "mean return", "max return"):
        table.add_column(name, justify="right")
    entries = [index[task] for task in tasks]
    for task, entry in zip(tasks, entries, strict=True):
        numbers = (f"{entry.success_rate:.2f}", f"{entry.mean_return:.0f}", f"{entry.max_return:.0f}")
        table.add_row(task, str(entry.episodes), *numbers)
    if len(tasks) > 1:
        success = sum(entry.success_rate for entry in entries) / len(entries)
        mean = sum(entry.mean_return for entry in entries) / len(entries)
        table.add_section()
        table.add_row("mean of the tasks", "", f"{success:.3f}", f"{mean:.0f}", "")
    console = Console()
    console.print(table)
    first = entries[0]
    console.print(
        f"{index.folder}: noise {first.noise:g}, seed {first.seed}, horizon {first.horizon}; {seconds:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
