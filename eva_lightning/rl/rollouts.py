"""Success and return of a Decision Transformer, measured in the simulator.

Success means: solved at some step of the episode, as in Meta-World's benchmark. It can be lost again before the episode
ends, so success at the last step is kept too; it is lower.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from eva_lightning.errors import InputError
from eva_lightning.rl.environments import HORIZON, MetaWorldEnvironment, check_horizon
from eva_lightning.rl.policy import DecisionTransformerPolicy, Mode
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.tasks import resolve_task
from eva_lightning.side_effects import isolated_rng, observing

if TYPE_CHECKING:
    from eva_lightning.rl.module import DecisionTransformerModule

Frames = npt.NDArray[np.uint8]
"""One episode's pictures, ``(T, H, W, 3)``."""


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """What N episodes of one task came to.

    Attributes:
        task: Full name of the task.
        successes: ``(N,)`` bool, solved at any step.
        final_successes: ``(N,)`` bool, solved at the last step.
        returns: ``(N,)`` float64, undiscounted sum of rewards.
        steps: Simulator steps taken in all.
        seconds: Wall-clock time, without building the environments.
        frames: Pictures of the first episodes, if any were wanted: one before each step, and the last.
    """

    task: str
    successes: npt.NDArray[np.bool_]
    final_successes: npt.NDArray[np.bool_]
    returns: npt.NDArray[np.float64]
    steps: int
    seconds: float
    frames: list[Frames] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.successes)

    @property
    def success_rate(self) -> float:
        """Share of the episodes solved at any step."""
        return float(self.successes.mean())

    @property
    def success_stderr(self) -> float:
        """Standard error of `success_rate`, ``sqrt(p (1 - p) / N)``; 0 says no more than that all N were alike."""
        rate = self.success_rate
        return float(np.sqrt(rate * (1 - rate) / len(self)))

    @property
    def final_success_rate(self) -> float:
        """Share of the episodes solved at the last step."""
        return float(self.final_successes.mean())

    @property
    def mean_return(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def return_stderr(self) -> float:
        """Standard error of `mean_return`; NaN for a single episode."""
        return float(self.returns.std(ddof=1) / np.sqrt(len(self))) if len(self) > 1 else float("nan")


def evaluate(
    module: DecisionTransformerModule,
    task: str,
    *,
    target_return: float,
    episodes: int = 50,
    seed: int = 0,
    mode: Mode = "exact",
    context: int | None = None,
    environments: int = 20,
    horizon: int = HORIZON,
    workers: int = 0,
    video_episodes: int = 0,
    video_size: int = 240,
    progress: bool = False,
) -> RolloutResult:
    """Roll out `module` on evaluation goals and say how it went.

    Episode i has evaluation goal i of `seed` (modulo 50) and the policy has no randomness: the same arguments give the
    same episodes, with any number of environments and workers up to rounding in the batched network. Nothing of the
    module changes, neither do the global generators.

    Args:
        module: The module, with or without adapters.
        task: Task, such as ``push-v3``.
        target_return: Return the policy is asked for; the paper takes the largest in the task's data.
        episodes: Number of episodes.
        seed: Seed of the goals.
        mode, context: See :class:`~eva_lightning.rl.policy.DecisionTransformerPolicy`.
        environments: Episodes in lock-step, one network call for all; per worker.
        horizon: Steps per episode, at most 500.
        workers: Processes, each with environments and a copy of the module on the CPU; 0 for this process. Pays with
            more cores than the network uses.
        video_episodes: Record so many of the first episodes, where this machine can draw.
        video_size: Height and width of their frames, in pixels.
        progress: Show a progress bar.

    Raises:
        InputError: An argument is out of range, or video is wanted and this machine cannot draw.
    """
    task = resolve_task(task)
    check_horizon(horizon)
    for name, value, lowest in (
        ("episodes", episodes, 1),
        ("environments", environments, 1),
        ("workers", workers, 0),
        ("video_episodes", video_episodes, 0),
    ):
        if value < lowest:
            raise InputError(f"{name} must be at least {lowest}, got {value}")
    if video_episodes and rendering_backend() is None:
        raise InputError(no_video_reason())
    video = min(video_episodes, episodes)
    order = list(range(episodes))
    options: dict[str, Any] = {
        "target_return": target_return, "seed": seed, "mode": mode, "context": context, "environments": environments,
        "horizon": horizon, "video_episodes": video, "video_size": video_size,
    }  # fmt: skip
    with _progress_bar(progress, task, episodes * horizon) as advance:
        if workers == 0 or episodes == 1:
            parts = [_roll_out(module, task, order, advance=advance, **options)]
        else:
            shares = [share.tolist() for share in np.array_split(order, min(workers, episodes))]
            parts = _in_processes(module, task, shares, options, advance)
    return RolloutResult(
        task,
        np.concatenate([part.successes for part in parts]),
        np.concatenate([part.final_successes for part in parts]),
        np.concatenate([part.returns for part in parts]),
        sum(part.steps for part in parts),
        max(part.seconds for part in parts),
        [frames for part in parts for frames in part.frames],
    )


def _roll_out(
    module: DecisionTransformerModule,
    task: str,
    order: Sequence[int],
    *,
    target_return: float,
    seed: int,
    mode: Mode,
    context: int | None,
    environments: int,
    horizon: int,
    video_episodes: int,
    video_size: int,
    advance: Callable[[int], None],
) -> RolloutResult:
    """The episodes `order`, in this process."""
    count = min(environments, len(order))
    successes, final = np.zeros(len(order), bool), np.zeros(len(order), bool)
    returns = np.zeros(len(order))
    frames: list[Frames] = []
    filmed = sum(episode < video_episodes for episode in order)
    with ExitStack() as stack:
        # a module that trains comes with its modes, and metaworld draws from NumPy's global generator
        stack.enter_context(isolated_rng())
        stack.enter_context(observing(module))
        # checks target and context before anything is built
        policy = DecisionTransformerPolicy(module, count, target_return, mode, context)
        envs = []
        for index in range(count):
            size = video_size if index < filmed else None
            env = MetaWorldEnvironment(task, seed=seed, split="eval", horizon=horizon, render_size=size)
            envs.append(stack.enter_context(env))
        started = time.perf_counter()
        for first in range(0, len(order), count):
            chunk = list(range(first, min(first + count, len(order))))
            if len(chunk) < policy.n_environments:
                policy = DecisionTransformerPolicy(module, len(chunk), target_return, mode, context)
            policy.reset()
            observations = np.stack([env.reset(order[i]) for env, i in zip(envs, chunk, strict=False)])
            rewards: npt.NDArray[np.float64] | None = None
            films: list[list[Frames]] = [[envs[k].render()] for k, i in enumerate(chunk) if i < filmed]
            for _ in range(horizon):
                actions = policy.act(observations, rewards)
                rewards = np.empty(len(chunk))
                for k, i in enumerate(chunk):
                    observations[k], rewards[k], solved, _ = envs[k].step(actions[k])
                    successes[i] |= solved
                    final[i] = solved
                    if k < len(films):
                        films[k].append(envs[k].render())
                returns[chunk] += rewards
                advance(len(chunk))
            frames += [np.stack(film) for film in films]
        seconds = time.perf_counter() - started
    return RolloutResult(task, successes, final, returns, len(order) * horizon, seconds, frames)


def _in_processes(
    module: DecisionTransformerModule,
    task: str,
    shares: Sequence[Sequence[int]],
    options: dict[str, Any],
    advance: Callable[[int], None],
) -> list[RolloutResult]:
    """One process per share; all are ended, whatever happens here."""
    import copy
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    twin = copy.deepcopy(_without_trainer(module)).cpu()
    # fork would copy the simulator's and CUDA's threads half-dead
    pool = ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn"), _one_thread)
    try:
        futures = {pool.submit(_share, twin, task, share, options): i for i, share in enumerate(shares)}
        for future in as_completed(futures):
            advance(future.result().steps)
        return [future.result() for future in futures]
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _share(
    module: DecisionTransformerModule, task: str, order: Sequence[int], options: dict[str, Any]
) -> RolloutResult:
    return _roll_out(module, task, order, advance=lambda _: None, **options)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _without_trainer(module: DecisionTransformerModule) -> DecisionTransformerModule:
    """The same layers in another shell: a trainer, with its data loaders and loggers, cannot go to other processes."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for name in ("_trainer", "_fabric"):
        vars(twin)[name] = None
    for name in ("on_save_checkpoint", "on_load_checkpoint", "configure_model"):
        vars(twin).pop(name, None)
    return twin


class _progress_bar:
    """A rich progress bar over simulator steps, or nothing; gives a function that moves it on."""

    def __init__(self, wanted: bool, task: str, total: int) -> None:
        self._wanted, self._task, self._total = wanted, task, total

    def __enter__(self) -> Callable[[int], None]:
        self._bar: Any = None
        if not self._wanted:
            return lambda steps: None
        from rich.progress import Progress

        self._bar = Progress(transient=True)
        self._bar.start()
        row = self._bar.add_task(f"roll-outs of {self._task}", total=self._total)

        def advance(steps: int) -> None:
            self._bar.advance(row, steps)

        return advance

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
