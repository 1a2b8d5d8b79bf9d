"""Load a checkpoint, with or without adapters, roll it out, and print a table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from eva_lightning.checkpoint import KEY, fit_to_checkpoint
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.rl.demonstrations import read_index
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.rl.protocol import protocol_of
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.rollouts import RolloutResult, evaluate
from eva_lightning.rl.tasks import parse_tasks
from eva_lightning.rl.video import check_format, write_video
from experiments.metaworld.evaluate import Settings
from experiments.metaworld.measures import EPISODE_BRACKETS, success_range, warn_of_target
from experiments.metaworld.success import COLUMNS_NOTE, PAPER_NOTE, definitions
from experiments.runner.statistics import Interval
from experiments.runner.tables import show

_LOGGER = logging.getLogger(__name__)

_NOTES = (f"{COLUMNS_NOTE}; {EPISODE_BRACKETS}; ±: half a 95% interval (Student's t)", PAPER_NOTE)


def run(settings: Settings) -> list[RolloutResult]:
    """Roll out all tasks and print a table."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # silence its CUDA-kernel message
    film = None if settings.video is None else check_format(settings.video)
    if film is not None and rendering_backend() is None:
        _LOGGER.warning(no_video_reason())
        film = None
    module, about = load_module(settings.ckpt, settings.init)
    tasks = settings.task or tuple(about.get("tasks") or ())
    if not tasks:
        raise InputError(f"{settings.ckpt} does not say which tasks it was trained on: name one with --task")
    targets = {task: target_return(settings, task, about) for task in parse_tasks(tasks)}
    mode: Any = settings.mode
    results = []
    for task, target in targets.items():
        result = evaluate(
            module,
            task,
            target_return=target,
            episodes=settings.episodes,
            seed=settings.seed,
            mode=mode,
            context=settings.context,
            environments=settings.environments,
            horizon=settings.horizon,
            workers=settings.workers,
            video_episodes=0 if film is None else settings.video_episodes,
            video_size=settings.video_size,
            progress=settings.progress and sys.stdout.isatty(),
        )
        results.append(result)
        if film is not None:
            name = film if len(targets) == 1 else film.with_name(f"{film.stem}-{task}{film.suffix}")
            print(f"{write_video(result.frames, name)}: {len(result.frames)} episodes")
    _report(results, targets)
    protocol = protocol_of(module.hparams)
    Console().print(f"protocol: {'without a name' if protocol is None else protocol.name}", highlight=False)
    return results


def load_module(
    checkpoint: str | Path, init: str | Path | None = None
) -> tuple[DecisionTransformerModule, dict[str, Any]]:
    """The module of a checkpoint, and what the checkpoint has under ``"about"``.

    Args:
        checkpoint: A checkpoint file, or the folder of a run.
        init: Checkpoint with the frozen weights, for one that has adapters alone; the one that it names for None.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no checkpoint of a Decision Transformer, or its adapters belong to other weights.
    """
    file = Path(checkpoint)
    if file.is_dir():
        file = file / "weights.ckpt"
    found = read_checkpoint(file)
    about: dict[str, Any] = dict(found.get("about") or {})
    description: Mapping[str, Any] | None = found.get(KEY)
    if description is None:
        return DecisionTransformerModule.from_pretrained(file), about
    hparams = {name: value for name, value in found["hyper_parameters"].items() if not name.startswith("_")}
    if description["base_fingerprint"] is None:
        module = DecisionTransformerModule(**hparams)
    else:
        source = about.get("init") if init is None else init
        if source is None:
            raise InputError(f"{file} holds adapters alone: name the checkpoint they were trained on with --init")
        module = DecisionTransformerModule.from_pretrained(source, context=hparams["context"])
    fit_to_checkpoint(module, found)
    module.load_state_dict(found["state_dict"])
    return module, about


def target_return(settings: Settings, task: str, about: Mapping[str, Any]) -> float:
    """The return to ask for: given, said by the checkpoint, or the largest of the demonstrations.

    Raises:
        MissingInputError: There are no demonstrations of the task, and the checkpoint has no target return.
    """
    known = about.get("max_return") or {}
    mean = (about.get("mean_return") or {}).get(task)
    if settings.target_return is not None:
        target = settings.target_return
        if mean is None:
            # it serves a warning alone: missing demonstrations are no reason to stop
            with suppress(InputError):
                mean = read_index(settings.data)[task].mean_return
    elif task in known:
        target = known[task]
    else:
        try:
            entry = read_index(settings.data)[task]
        except MissingInputError as error:
            raise MissingInputError(f"{settings.ckpt} has no target return for {task}, and {error}") from error
        target, mean = entry.max_return, entry.mean_return
    if mean is not None:
        warn_of_target(task, target, mean)
    return float(target)


def _report(results: Sequence[RolloutResult], targets: Mapping[str, float]) -> None:
    rows = [
        {
            "task": result.task,
            **{each.title: success_range(getattr(result, each.episodes).tolist()) for each in definitions()},
            "return": Interval.of(result.returns.tolist()),
            "target": targets[result.task],
        }
        for result in results
    ]
    if len(results) > 1:
        means = {each.title: sum(getattr(r, each.rate) for r in results) / len(results) for each in definitions()}
        rows.append({"task": "mean of the tasks", **means})
    frame = pd.DataFrame(rows, dtype=object).set_index("task")
    show(frame, f"success and return of {len(results[0])} episodes", {"return": 0, "target": 0}, notes=_NOTES)
    steps, seconds = sum(result.steps for result in results), sum(result.seconds for result in results)
    Console().print(f"{steps:,} steps in {seconds:.1f} s", highlight=False)
