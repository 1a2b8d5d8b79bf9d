"""What collecting costs beside the simulator and the experts: the project's `collect` against a bare loop, interleaved.

The bare loop is what one would write by hand: ``MT1``, the environment's class, ``set_task``, ``reset``, the expert, a
clipped action, ``step``; nothing is kept. Ours adds noise, both actions, compression, checksums and writing to disk.
Both are timed from nothing to the last episode, task by task, and the ratio is the median over tasks and repeats. The
bare loop's time is also given without its preparations, which is the stricter comparison.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import metaworld
import numpy as np
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from benchmarks.harness import Figure, Figures, in_turn, usable_cores
from eva_lightning.processes import process_pool
from eva_lightning.rl.collection import collect
from eva_lightning.rl.environments import forget_goals
from eva_lightning.rl.tasks import HORIZON, resolve_task

TASKS = ("faucet-close-v3", "window-close-v3", "push-v3", "handle-press-side-v3")
TARGET = ">= 0.9"


def measure(
    tasks: Sequence[str] = TASKS,
    episodes: int = 40,
    repeats: int = 3,
    horizon: int = HORIZON,
    seed: int = 0,
    workers: int | None = None,
) -> Figures:
    """Time both, in this process, and then in several at once.

    Args:
        tasks: Tasks to collect, one after the other.
        episodes: Episodes per task and repeat.
        repeats: Timed runs of each.
        horizon: Steps per episode.
        seed: Seed of goals and noise.
        workers: Processes of the comparison of several; None for one per core, and no such comparison where that is 1.

    Returns:
        ``collect_ratio``: our steps per second ÷ those of the bare loop, both with their preparations;
        ``collect_ratio_strict``: the bare loop's preparations left out; ``collect_steps_per_second`` and
        ``collect_raw_steps_per_second``: with preparations; ``collect_ratio_workers``, ``collect_workers``: the first
        ratio with so many processes of ours and as many bare loops side by side, the start of ours included.
    """
    tasks = [resolve_task(task) for task in tasks]
    _bare_loop(tasks[0], 1, horizon, seed)  # imports
    ours, bare, without_preparations = [], [], []
    for _ in range(repeats):
        for task in tasks:
            forget_goals()
            ours.append(_ours([task], episodes, horizon, seed))
            prepared, ran = _bare_loop(task, episodes, horizon, seed)
            bare.append(prepared + ran)
            without_preparations.append(ran)
    steps = episodes * horizon
    figures = {
        "collect_ratio": Figure.ratio(bare, ours, TARGET),
        "collect_ratio_strict": Figure.ratio(without_preparations, ours),
        "collect_steps_per_second": Figure.of(steps / seconds for seconds in ours),
        "collect_raw_steps_per_second": Figure.of(steps / seconds for seconds in bare),
    }
    workers = usable_cores() if workers is None else workers
    if workers > 1:
        figures["collect_ratio_workers"] = _several(tasks, episodes, repeats, horizon, seed, workers)
        figures["collect_workers"] = Figure.of([workers])
    return figures


def _several(tasks: Sequence[str], episodes: int, repeats: int, horizon: int, seed: int, workers: int) -> Figure:
    with process_pool(workers) as pool:

        def bare(jobs: Sequence[str], of_each: int, steps: int) -> float:
            began = time.perf_counter()
            for future in [pool.submit(_bare_loop, task, of_each, steps, seed) for task in jobs]:
                future.result()
            return time.perf_counter() - began

        bare([tasks[0]] * workers, 1, 1)  # processes and imports
        seconds = in_turn(
            {
                "ours": lambda: _ours(tasks, episodes, horizon, seed, workers),
                "bare": lambda: bare(tasks, episodes, horizon),
            },
            repeats,
        )
    return Figure.ratio(seconds["bare"], seconds["ours"], TARGET)


def _ours(tasks: Sequence[str], episodes: int, horizon: int, seed: int, workers: int = 1) -> float:
    """Seconds of a collection into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        collect(tasks, episodes, Path(folder), seed=seed, horizon=horizon, workers=workers, progress=False)
        return time.perf_counter() - began


def _bare_loop(task: str, episodes: int, horizon: int, seed: int) -> tuple[float, float]:
    """Seconds of the preparations, and of the episodes."""
    began = time.perf_counter()
    goals = metaworld.MT1(task, seed=seed).train_tasks
    environment = ALL_V3_ENVIRONMENTS[task](reward_function_version="v2")
    expert = ENV_POLICY_MAP[task]()  # type: ignore[abstract]
    prepared = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Constant.*may be too high")
        for episode in range(episodes):
            environment.set_task(goals[episode % len(goals)])
            observation, _ = environment.reset()
            for _ in range(horizon):
                action = np.clip(expert.get_action(observation), -1.0, 1.0)
                observation, *_ = environment.step(action)
    ended = time.perf_counter()
    environment.close()
    return prepared - began, ended - prepared
