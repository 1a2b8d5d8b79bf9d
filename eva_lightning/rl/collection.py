"""Demonstrations by metaworld's scripted experts, over processes, resumable at any moment.

Episode `i` of a task has goal number `i` (modulo 50) and noise from a generator of its own, made of the seed, the task
and `i`: its bits do not depend on the number of processes, their order, or interruptions.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from metaworld.policies import ENV_POLICY_MAP
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn

from eva_lightning.errors import InputError, check_number
from eva_lightning.files import only_process, writable_folder
from eva_lightning.processes import process_pool
from eva_lightning.rl.demonstrations import DemonstrationIndex, TaskDemonstrations, join, read_index
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.partial_store import Chunk, Conditions, PartialStore
from eva_lightning.rl.tasks import ACTION_DIM, HORIZON, STATE_DIM, resolve_task


class ExpertRunner:
    """Lets the scripted experts act in this process; keeps the environment of the last task."""

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self._environment: MetaWorldEnvironment | None = None

    def run(self, chunk: Chunk) -> TaskDemonstrations:
        """The episodes of `chunk`."""
        if self._environment is None or self._environment.task != chunk.task:
            self.close()
            conditions = self._conditions
            self._environment = MetaWorldEnvironment(
                chunk.task, seed=conditions.seed, split="train", horizon=conditions.horizon
            )
        with warnings.catch_warnings():
            # experts often ask for more than a step can do; the action is clipped
            warnings.filterwarnings("ignore", message="Constant.*may be too high")
            return join([self._episode(self._environment, number) for number in range(chunk.start, chunk.stop)])

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def __enter__(self) -> ExpertRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _episode(self, environment: MetaWorldEnvironment, number: int) -> TaskDemonstrations:
        steps = self._conditions.horizon
        expert: Any = ENV_POLICY_MAP[environment.task]
        expert = expert()
        noise = self._conditions.noise * _generator(self._conditions.seed, environment.task, number).standard_normal(
            (steps, ACTION_DIM)
        )
        observations = np.empty((steps + 1, STATE_DIM), dtype=np.float32)
        wanted = np.empty((steps, ACTION_DIM), dtype=np.float32)
        executed = np.empty((steps, ACTION_DIM), dtype=np.float32)
        rewards = np.empty(steps, dtype=np.float32)
        successes = np.empty(steps, dtype=np.bool_)
        observation, _ = environment.reset(options={"goal": number})
        observations[0] = observation
        for step in range(steps):
            wanted[step] = np.clip(expert.get_action(observation), -1.0, 1.0)
            # the number that is stored is the number that is executed: a replay of the file gives the same episode
            executed[step] = np.clip(wanted[step] + noise[step], -1.0, 1.0)
            observation, rewards[step], _, _, info = environment.step(executed[step])
            successes[step] = info["success"]
            observations[step + 1] = observation
        return TaskDemonstrations(
            environment.task,
            observations=observations[None],
            actions=executed[None],
            expert_actions=wanted[None],
            rewards=rewards[None],
            successes=successes[None],
            goals=np.array([number % environment.n_goals], dtype=np.int64),
        )


def _generator(seed: int, task: str, episode: int) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32(task.encode()), episode))


def collect(
    tasks: Sequence[str],
    episodes: int,
    folder: str | Path,
    *,
    noise: float = 0.1,
    seed: int = 0,
    workers: int = 1,
    horizon: int = HORIZON,
    progress: bool = True,
) -> DemonstrationIndex:
    """Fill a folder with demonstrations; what it holds already is kept, what is damaged is collected again.

    Args:
        tasks: Tasks, such as ``push-v3``.
        episodes: Episodes per task; a task that has more keeps them.
        folder: Folder of demonstrations, created if needed.
        noise: Standard deviation of the Gaussian noise on the expert's action, which is in [-1, 1].
        seed: Seed of goals and noise.
        workers: Processes; 1 works in this one. The result does not depend on it.
        horizon: Steps per episode, at most 500.
        progress: Show a progress bar on standard error, in a terminal.

    Returns:
        The folder's index, of these and all other tasks.

    Raises:
        InputError: An argument is wrong, the folder holds demonstrations made with another noise, seed or horizon, or
            another process is collecting into it.
        BrokenProcessPool: A process ended unexpectedly; finished episodes are kept.
    """
    tasks = [resolve_task(task) for task in tasks]
    conditions = Conditions(float(noise), seed, horizon)
    check_number("episodes", episodes, at_least=1, whole=True)
    check_number("workers", workers, at_least=1, whole=True)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"demonstrations need a folder, and {folder} is a file")
    with only_process(writable_folder(folder) / ".lock", f"another process is collecting into {folder}"):
        conditions.check_folder(folder)
        store = PartialStore(folder, conditions)
        pending = {task: store.missing(task, episodes) for task in tasks}
        total = sum(chunk.stop - chunk.start for plan in pending.values() for chunk in plan)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("episodes"))
        console, shown = Console(stderr=True), progress and total > 0
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            row = bar.add_task("collecting", total=total)
            for task, plan in pending.items():
                # all chunks were there, but the file was not written yet
                if not plan:
                    store.finish(task)
            for chunk, demonstrations in _run_all(pending, conditions, workers):
                store.add(chunk, demonstrations)
                bar.update(row, advance=len(demonstrations), description=chunk.task)
                pending[chunk.task].remove(chunk)
                if not pending[chunk.task]:
                    store.finish(chunk.task)
        store.close()
    return read_index(folder)


def _run_all(
    pending: Mapping[str, Sequence[Chunk]], conditions: Conditions, workers: int
) -> Iterator[tuple[Chunk, TaskDemonstrations]]:
    """All chunks with their episodes, in the order in which they are finished."""
    queue = ChunkQueue(pending)
    workers = min(workers, len(queue))
    if workers <= 1:
        with ExpertRunner(conditions) as runner:
            chunk = queue.next(None)
            while chunk is not None:
                yield chunk, runner.run(chunk)
                chunk = queue.next(chunk.task)
        return
    with contextlib.ExitStack() as stack:
        # a pool for each process: one that has a task's environment gets more of that task
        pools = [stack.enter_context(process_pool(1)) for _ in range(workers)]
        busy: dict[Future[TaskDemonstrations], tuple[ProcessPoolExecutor, Chunk]] = {}

        def assign(pool: ProcessPoolExecutor, last: str | None) -> None:
            chunk = queue.next(last)
            if chunk is not None:
                busy[pool.submit(_run_in_process, conditions, chunk)] = pool, chunk

        for pool in pools:
            assign(pool, None)
        while busy:
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                pool, chunk = busy.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise BrokenProcessPool(
                        f"a process ended unexpectedly while collecting {chunk.task}: finished episodes are kept, run "
                        "the command again"
                    ) from error
                # the next chunk first: the process should not wait for our disk
                assign(pool, chunk.task)
                yield chunk, result


@functools.lru_cache(maxsize=1)
def _runner_of_process(conditions: Conditions) -> ExpertRunner:
    return ExpertRunner(conditions)


def _run_in_process(conditions: Conditions, chunk: Chunk) -> TaskDemonstrations:
    return _runner_of_process(conditions).run(chunk)


class ChunkQueue:
    """Chunks to do. A process that has a task's environment open gets more of that task; others begin another one."""

    def __init__(self, pending: Mapping[str, Sequence[Chunk]]) -> None:
        self._waiting = {task: list(chunks) for task, chunks in pending.items() if chunks}
        self._begun: set[str] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def next(self, last: str | None) -> Chunk | None:
        """The next chunk for a process that worked on task `last`, or None if there is nothing left."""
        if not self._waiting:
            return None
        if last in self._waiting:
            task = last
        else:
            fresh = [task for task in self._waiting if task not in self._begun]
            task = fresh[0] if fresh else max(self._waiting, key=lambda name: len(self._waiting[name]))
        assert task is not None
        self._begun.add(task)
        chunk = self._waiting[task].pop(0)
        if not self._waiting[task]:
            del self._waiting[task]
        return chunk
