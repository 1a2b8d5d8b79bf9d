"""Demonstrations by metaworld's scripted experts, over processes, resumable at any moment.

Episode `i` of a task has goal number `i` (modulo 50) and noise from a generator of its own, made of the seed, the task
and `i`: its bits do not depend on how many processes work, in what order, or after which interruption.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import traceback
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eva_lightning.errors import InputError
from eva_lightning.rl.demonstrations import (
    INDEX,
    DemonstrationIndex,
    DemonstrationMeta,
    TaskDemonstrations,
    decode,
    encode,
    join,
    load_task,
    read_index,
    write_atomically,
    write_task,
)
from eva_lightning.rl.environments import ACTION_DIM, HORIZON, STATE_DIM, MetaWorldEnvironment, check_horizon
from eva_lightning.rl.tasks import resolve_task

logger = logging.getLogger(__name__)

#: Episodes between two writes: what an interruption can cost each process, about two seconds.
CHUNK = 10
_PARTIAL = ".partial"
_PACKAGES = ("metaworld", "mujoco", "gymnasium", "numpy")


@dataclass(frozen=True)
class Conditions:
    """What decides, with the task and its number, the bits of an episode.

    Attributes:
        noise: Standard deviation of the Gaussian noise added to the expert's clipped action.
        seed: Seed of goals and noise.
        horizon: Steps per episode.

    Raises:
        InputError: `noise` is negative or not finite, or `horizon` is not from 1 to 500.
    """

    noise: float
    seed: int
    horizon: int

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise InputError(f"noise must be at least 0 and finite, got {self.noise}")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed must be at least 0 and below 2^31, got {self.seed}")
        check_horizon(self.horizon)


@dataclass(frozen=True)
class Chunk:
    """Episodes `start` to `stop` (excluded) of one task."""

    task: str
    start: int
    stop: int


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
            # experts ask for more than a step can do all the time; the action is clipped
            warnings.filterwarnings("ignore", message="Constant.*may be too high")
            return join([self._episode(self._environment, number) for number in range(chunk.start, chunk.stop)])

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def __enter__(self) -> ExpertRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _episode(self, environment: MetaWorldEnvironment, number: int) -> TaskDemonstrations:
        from metaworld.policies import ENV_POLICY_MAP

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
        observation = environment.reset(number)
        observations[0] = observation
        for step in range(steps):
            wanted[step] = np.clip(expert.get_action(observation), -1.0, 1.0)
            # the number that is stored is the number that is executed: a replay of the file gives the same episode
            executed[step] = np.clip(wanted[step] + noise[step], -1.0, 1.0)
            observation, rewards[step], successes[step], _ = environment.step(executed[step])
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
    """Fill a folder with demonstrations; what it holds already is kept, what is damaged is made again.

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
        RuntimeError: A process ended unexpectedly; finished episodes are kept.
    """
    tasks = [resolve_task(task) for task in tasks]
    conditions = Conditions(float(noise), seed, horizon)
    for name, value in (("episodes", episodes), ("workers", workers)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"demonstrations need a folder, and {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        _refuse_other_conditions(folder, conditions)
        store = _PartialStore(folder, conditions)
        pending = {task: plan for task in tasks if (plan := store.missing(task, episodes))}
        total = sum(chunk.stop - chunk.start for plan in pending.values() for chunk in plan)
        with _progress_bar(progress and total > 0) as bar:
            shown = bar.add_task("collecting", total=total)
            for task in tasks:
                # all chunks were there, but the file was not written yet
                if task not in pending:
                    store.finish(task)
            for chunk, demonstrations in _run_all(pending, conditions, workers):
                store.add(chunk, demonstrations)
                bar.update(shown, advance=len(demonstrations), description=chunk.task)
                pending[chunk.task].remove(chunk)
                if not pending[chunk.task]:
                    store.finish(chunk.task)
        store.close()
    return read_index(folder)


class _PartialStore:
    """Finished chunks of unfinished tasks, in a folder per conditions, and what is known of finished tasks."""

    def __init__(self, folder: Path, conditions: Conditions) -> None:
        self._folder = folder
        self._conditions = conditions
        name = f"noise{conditions.noise!r}-seed{conditions.seed}-horizon{conditions.horizon}"
        self._partial = folder / _PARTIAL / name
        # left by writers that were killed: nobody else writes here now
        for path in (*folder.glob("*.part"), *self._partial.glob("*.part")):
            path.unlink(missing_ok=True)

    def missing(self, task: str, episodes: int) -> list[Chunk]:
        """What is left to do for `task` to have `episodes` episodes."""
        entry = read_index(self._folder).tasks.get(task) if (self._folder / INDEX).is_file() else None
        have: set[int] = set()
        if entry is not None:
            if self._finished(task) is not None:
                have.update(range(entry.episodes))
            else:
                episodes = max(episodes, entry.episodes)
        for chunk in self._chunks(task):
            have.update(range(chunk.start, chunk.stop))
        return [
            Chunk(task, start, stop)
            for begin in range(0, episodes, CHUNK)
            for start, stop in _runs([i for i in range(begin, min(begin + CHUNK, episodes)) if i not in have])
        ]

    def add(self, chunk: Chunk, demonstrations: TaskDemonstrations) -> None:
        """Keep a finished chunk."""
        self._partial.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(chunk), encode(demonstrations, compress=False))

    def finish(self, task: str) -> None:
        """Make one file of all that there is of `task`, if that is more than its file holds already."""
        chunks = self._chunks(task)
        if not chunks:
            return
        old = self._finished(task)
        parts = [] if old is None else [old]
        have = sum(len(part) for part in parts)
        for chunk in chunks:
            # a chunk can reach into what the file has, where a kill came between writing that and deleting this
            if chunk.start <= have < chunk.stop:
                demonstrations = self._read(chunk)
                parts.append(demonstrations.episodes(have - chunk.start))
                have = chunk.stop
        if old is None or have > len(old):
            versions = {name: version(name) for name in _PACKAGES}
            if old is not None:
                before = read_index(self._folder)[task].versions
                if dict(before) != versions:
                    logger.warning("%s: new episodes come from %s, earlier ones from %s", task, versions, dict(before))
                    versions = dict(before)
            meta = DemonstrationMeta(self._conditions.noise, self._conditions.seed, versions)
            write_task(self._folder, join(parts), meta)
        for chunk in chunks:
            if chunk.stop <= have:
                self._path(chunk).unlink()

    def close(self) -> None:
        """Remove the folders if they are empty."""
        for path in (self._partial, self._partial.parent):
            with contextlib.suppress(OSError):
                path.rmdir()

    def _finished(self, task: str) -> TaskDemonstrations | None:
        if not (self._folder / INDEX).is_file() or task not in read_index(self._folder):
            return None
        try:
            return load_task(self._folder, task)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("%s is collected again: %s", task, error)
            return None

    def _chunks(self, task: str) -> list[Chunk]:
        chunks = []
        for path in self._partial.glob(f"{task}.*.npz"):
            start, stop = path.name.split(".")[1].split("-")
            chunk = Chunk(task, int(start), int(stop))
            try:
                self._read(chunk)
            except ValueError:
                path.unlink()
            else:
                chunks.append(chunk)
        return sorted(chunks, key=lambda chunk: chunk.start)

    def _read(self, chunk: Chunk) -> TaskDemonstrations:
        return decode(chunk.task, self._path(chunk).read_bytes())

    def _path(self, chunk: Chunk) -> Path:
        return self._partial / f"{chunk.task}.{chunk.start}-{chunk.stop}.npz"


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Borders ``(start, stop)`` of the runs of consecutive numbers in an ascending list."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i


def _refuse_other_conditions(folder: Path, conditions: Conditions) -> None:
    if not (folder / INDEX).is_file():
        return
    for task, entry in read_index(folder).tasks.items():
        for name in ("noise", "seed", "horizon"):
            there, now = getattr(entry, name), getattr(conditions, name)
            if there != now:
                raise InputError(
                    f"{folder} holds demonstrations of {task} with {name} {there}, not {now}: choose another folder"
                )


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    import fcntl

    # the system lets go of the lock however this process ends
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is collecting into {folder}: wait for it or end it") from None
        yield


def _progress_bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("episodes"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )


def _run_all(
    pending: dict[str, list[Chunk]], conditions: Conditions, workers: int
) -> Iterator[tuple[Chunk, TaskDemonstrations]]:
    """All chunks with their episodes, in the order in which they are finished."""
    queue = _Queue(pending)
    workers = min(workers, len(queue))
    if workers <= 1:
        with ExpertRunner(conditions) as runner:
            chunk = queue.next(None)
            while chunk is not None:
                yield chunk, runner.run(chunk)
                chunk = queue.next(chunk.task)
        return
    context = multiprocessing.get_context("spawn")
    crew: dict[Connection, Any] = {}
    busy: dict[Connection, Chunk] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, conditions), daemon=True)
            process.start()
            # with our copy open, the end of the process would go unnoticed
            theirs.close()
            crew[ours] = process
            _assign(ours, queue.next(None), busy)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                chunk = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    crew[connection].join()
                    code = crew[connection].exitcode
                    raise RuntimeError(
                        f"a process ended unexpectedly (exit status {code}) while collecting {chunk.task}: "
                        "finished episodes are kept, run the command again"
                    ) from None
                if isinstance(result, str):
                    raise RuntimeError(f"collecting {chunk.task} failed in a process:\n{result}")
                # the next chunk first: the worker shall not wait for our disk
                _assign(connection, queue.next(chunk.task), busy)
                yield chunk, result
    finally:
        for connection, process in crew.items():
            connection.close()
            if busy:
                process.terminate()
            process.join()


class _Queue:
    """Chunks to do. Who has a task's environment open gets more of that task; others begin another one."""

    def __init__(self, pending: dict[str, list[Chunk]]) -> None:
        self._waiting = {task: list(chunks) for task, chunks in pending.items() if chunks}
        self._begun: set[str] = set()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def next(self, last: str | None) -> Chunk | None:
        """The next chunk for who did `last` before, or None if there is nothing left."""
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


def _assign(connection: Connection, chunk: Chunk | None, busy: dict[Connection, Chunk]) -> None:
    if chunk is not None:
        busy[connection] = chunk
        with contextlib.suppress(BrokenPipeError):  # noticed, and said, when the answer is read
            connection.send(chunk)


def _work(connection: Connection, conditions: Conditions) -> None:
    """What a process does: chunks in, episodes out, until the other end of `connection` is closed or dead."""
    # Ctrl-C reaches all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ExpertRunner(conditions) as runner, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            chunk = connection.recv()
            try:
                answer: TaskDemonstrations | str = runner.run(chunk)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
