"""Import published trajectories and print what they are worth, beside the paper's figures."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from eva_lightning.rl.demonstrations import DemonstrationIndex
from eva_lightning.rl.importing import import_published
from eva_lightning.rl.published_source import open_source
from experiments.metaworld.demonstration_table import show_demonstrations
from experiments.metaworld.importing import Settings

_UNKNOWN = "– under any step and last step: the files do not say which steps were solved."


def run(settings: Settings) -> DemonstrationIndex:
    """Import, report."""
    downloads = None if settings.downloads is None else Path(settings.downloads)
    source = open_source(settings.from_, settings.revision, downloads)
    index = import_published(
        source, settings.tasks, settings.out, episodes=settings.episodes, horizon=settings.horizon, tell=_say
    )
    show_demonstrations(index, settings.tasks, beside_paper=True)
    if any(index[task].success_rate is None for task in settings.tasks):
        _say(_UNKNOWN)
    _say(f"{index.folder}: train on it with --data {index.folder}")
    return index


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)
