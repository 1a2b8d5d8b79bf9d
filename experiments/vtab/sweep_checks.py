"""What is checked before a sweep starts anything: names, data, weights, room on the disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from eva_lightning.errors import InputError
from eva_lightning.files import check_writable, format_bytes, free_bytes
from eva_lightning.vision.backbone.timm_models import resolve_model
from eva_lightning.vision.data.splits import TaskData, open_task
from experiments.runner.jobs import PHASE_FOLDERS
from experiments.runner.loggers import check_loggers, parse_loggers
from experiments.vtab.sizes import ModelSize, missing_cache_bytes, runs_bytes
from experiments.vtab.sweep_settings import Settings
from experiments.vtab.weights import obtain_weights

_ROOM_TO_LEAVE = 256 * 2**20
#: Share of the machine's memory that processes may use to keep pre-trained models in.
_SHARE_FOR_MODELS = 0.25


def check_names(settings: Settings) -> ModelSize:
    """Refuse unknown models and options out of range; the size of the model.

    Raises:
        InputError: One is.
    """
    check_loggers(parse_loggers(settings.logger))
    resolve_model(settings.model)
    for key in settings.keys:
        settings.run(settings.task_names[0], key, rank=min(settings.search.ranks)).adapter_options()
    return ModelSize.of(settings.base)


def check_everything(settings: Settings) -> None:
    """Refuse what cannot work, in the order of what it costs to find out.

    Raises:
        MissingInputError, InputError: Data that is missing or wrong, an unknown model, a wrong option, too little room.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    size = check_names(settings)
    check_data(settings)
    obtain_weights(settings.model, settings.weights)
    check_room(settings, size)


def check_data(settings: Settings) -> None:
    """Look at the split files and images of every task.

    Raises:
        MissingInputError, InputError: What the first task lacks, and how many others lack something.
    """
    lacking = missing_data(settings)
    if not lacking:
        return
    first = next(iter(lacking.values()))
    if len(lacking) == 1 or not Path(settings.root).is_dir():
        raise first
    raise type(first)(
        f"{len(lacking)} of {len(settings.task_names)} tasks cannot be used, the first one because {first} "
        "(the prepare command gets data and checks all; --tasks leaves tasks out)"
    )


def missing_data(settings: Settings) -> dict[str, InputError]:
    """Task -> what is wrong with its data, for the tasks that cannot be used."""
    terminal = Console(stderr=True)
    # where there is no terminal, rich would still print an empty line
    hidden = not (settings.progress and terminal.is_terminal)
    lacking = {}
    for task in track(settings.task_names, "checking data", transient=True, console=terminal, disable=hidden):
        try:
            for opened in _opened_splits(settings, task):
                for key in settings.keys:
                    settings.rules.batches_per_epoch(len(opened.train), settings.batch_for(key.method))
        except InputError as error:
            lacking[task] = error
    return lacking


def _opened_splits(settings: Settings, task: str) -> Iterator[TaskData]:
    """The data of tuning and of final runs of a task, checked."""
    for split in ("train800", "train800val200") if settings.search.final_seeds else ("train800",):
        yield open_task(settings.root, task, split, settings.limit_train, settings.limit_test)


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a sweep still needs: `cache` in the folder of decoded images, `states` and `runs` in the output."""

    cache: int
    states: int
    runs: int

    @classmethod
    def of(cls, settings: Settings, size: ModelSize) -> DiskUse:
        """At the official sizes, at most."""
        limited = settings.limit_train is not None or settings.limit_test is not None
        images = settings.base.cache_dir
        tasks = [settings.task(name) for name in settings.task_names]
        cache = 0 if limited else missing_cache_bytes(tasks, settings.image_size, images)
        splits = 1 if settings.rules.decomposition is not None or not settings.search.final_seeds else 2
        states = sum(map(size.state_bytes, settings.states())) * splits * len(settings.task_names)
        runs = sum(runs_bytes(size, each, task, settings.search) for task in tasks for each in settings.contenders)
        return cls(cache, states, runs)


def check_room(settings: Settings, size: ModelSize) -> None:
    """Make sure that the disk has room for what a sweep leaves; of one that has begun, part is there already.

    Raises:
        UnwritableError: It cannot be written.
        InputError: It has not.
    """
    output = Path(settings.output)
    if any((output / folder).is_dir() for folder in PHASE_FOLDERS.values()):
        return
    use, cache = DiskUse.of(settings, size), settings.base.cache_dir or output
    needs = {output: use.states + use.runs, cache: use.cache}
    if _device(output) == _device(cache):
        needs = {output: sum(needs.values())}
    for folder, needed in needs.items():
        check_writable(folder)
        free = free_bytes(folder)
        if free < needed + _ROOM_TO_LEAVE:
            raise InputError(
                f"the sweep needs about {format_bytes(needed)} (decoded images {format_bytes(use.cache)}, EVA states "
                f"{format_bytes(use.states)}, runs {format_bytes(use.runs)}) and the disk of {folder} has "
                f"{format_bytes(free)} free: make room, choose another --output or --cache, or --cache none (slow: "
                "decodes images in every epoch)"
            )


def _device(folder: Path) -> int:
    """The disk that holds a folder, which need not exist yet."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists()).stat().st_dev


def may_keep_models(settings: Settings) -> bool:
    """Whether each process may keep the pre-trained model in memory between runs."""
    kept = 4 * ModelSize.of(settings.base).parameters * settings.slots_here()
    return kept <= _SHARE_FOR_MODELS * memory_bytes()


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
