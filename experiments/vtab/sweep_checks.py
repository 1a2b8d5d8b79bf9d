"""What is looked at before a sweep starts anything: names, data, weights, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from eva_lightning.errors import InputError
from eva_lightning.vision.data.splits import TaskData, open_task
from experiments.runner.loggers import check_loggers, parse_loggers
from experiments.vtab.jobs import SPLITS
from experiments.vtab.sizes import ModelSize, final_bytes, human, missing_cache_bytes
from experiments.vtab.sweep_settings import Settings

_ROOM_TO_LEAVE = 256 * 2**20
#: Share of the machine's memory that workers may use to keep pre-trained models in.
_SHARE_FOR_MODELS = 0.25


def check_everything(settings: Settings) -> None:
    """Refuse what cannot work, in the order of what it costs to find out.

    Raises:
        MissingInputError, InputError: Data that is missing or wrong, an unknown model, a wrong option, too little room.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    if settings.backend == "ray":
        from experiments.vtab.backend_ray import import_ray

        import_ray()
    check_loggers(parse_loggers(settings.base.logger))
    check_data(settings)
    from eva_lightning.vision.backbone.timm_models import resolve_model
    from eva_lightning.vision.backbone.weights import resolve_weights

    resolve_weights(resolve_model(settings.base.model), settings.base.weights)
    size = ModelSize.of(settings.base)
    for key in settings.keys:
        replace(settings.base, method=key.method, rho=key.rho or 1.0, rank=min(settings.search.ranks)).adapter_options()
    check_room(settings, size)


def check_data(settings: Settings) -> None:
    """Look at the split files and images of every task.

    Raises:
        MissingInputError, InputError: What the first task lacks, and how many others lack something.
    """
    errors: list[Exception] = []
    terminal = Console(stderr=True)
    # where there is no terminal, rich would still print an empty line
    hidden = not (settings.progress and terminal.is_terminal)
    tasks = track(settings.task_names, "checking data", transient=True, console=terminal, disable=hidden)
    for task in tasks:
        try:
            for opened in opened_splits(settings, task):
                settings.base.rules.batches_per_epoch(len(opened.train), settings.base.batch_size)
        except (FileNotFoundError, ValueError) as error:
            errors.append(error)
            if not Path(settings.root).is_dir():
                break
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise type(errors[0])(
            f"{len(errors)} of {len(settings.task_names)} tasks cannot be used, the first one because {errors[0]} "
            "(the prepare command gets data and checks all; --tasks leaves tasks out)"
        )


def opened_splits(settings: Settings, task: str) -> Iterator[TaskData]:
    """The data of tuning and of final runs of a task, checked."""
    base = settings.base
    phases = SPLITS.values() if settings.search.final_seeds else (SPLITS["tune"],)
    for split in phases:
        yield open_task(settings.root, task, split, base.limit_train, base.limit_test)


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a sweep still needs: `cache` in the folder of decoded images, `states` and `runs` in the output."""

    cache: int
    states: int
    runs: int


def disk_use(settings: Settings, size: ModelSize) -> DiskUse:
    """At the official sizes, at most."""
    base, grid = settings.base, settings.search
    limited = base.limit_train is not None or base.limit_test is not None
    cache = 0 if limited else missing_cache_bytes(settings.task_names, base.image_size, base.cache_dir)
    kinds = {key.state_kind: settings.components(key) for key in settings.keys if key.streams_eva}
    per_task = sum(size.state_bytes(components) for components in kinds.values())
    splits = 1 if base.rules.decomposition is not None or not grid.final_seeds else 2
    runs = sum(final_bytes(size, key, task, grid) for task in settings.task_names for key in settings.keys)
    return DiskUse(cache, per_task * splits * len(settings.task_names), runs)


def check_room(settings: Settings, size: ModelSize) -> None:
    """Make sure that the disk has room for what a sweep leaves.

    Raises:
        InputError: It has not.
    """
    use = disk_use(settings, size)
    output = _existing(Path(settings.output))
    cache = _existing(settings.base.cache_dir or output)
    needs: dict[Path, int] = {output: use.states + use.runs}
    same_disk = output.stat().st_dev == cache.stat().st_dev
    place = output if same_disk else cache
    needs[place] = needs.get(place, 0) + use.cache
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if free < needed + _ROOM_TO_LEAVE and not _has_begun(settings):
            raise InputError(
                f"the sweep needs about {human(needed)} (decoded images {human(use.cache)}, EVA states "
                f"{human(use.states)}, final runs {human(use.runs)}) and the disk of {folder} has {human(free)} free: "
                "make room, choose another --output or --cache, or --cache none (slow: decodes images in every epoch)"
            )


def _has_begun(settings: Settings) -> bool:
    """Whether part of what is needed may be there already: then the disk may be as full as it gets."""
    return settings.store_path.is_file()


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def expected_slots(settings: Settings) -> int:
    """Runs at a time on this machine."""
    from experiments.vtab.backend_local import default_workers, visible_gpus

    share = 1.0 if settings.gpus_per_run is None else settings.gpus_per_run
    gpus = len(visible_gpus()) if share > 0 and settings.base.accelerator != "cpu" else 0
    return settings.workers or default_workers(gpus, min(1.0, share or 1.0))


def may_keep_models(settings: Settings, slots: int) -> bool:
    """Whether each worker may keep the pre-trained model in memory between runs."""
    kept = 4 * ModelSize.of(settings.base).parameters * slots
    return kept <= _SHARE_FOR_MODELS * memory_bytes()


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
