"""Success and return of a Decision Transformer, measured in the simulator.

Success means: solved at some step of the episode, as in Meta-World's benchmark. It can be lost again before the episode
ends, so success at the last step is kept too; it is lower.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from eva_lightning.adapters import has_adapters, merge_and_unload
from eva_lightning.errors import InputError, check_number
from eva_lightning.processes import process_pool
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy, Mode
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.tasks import HORIZON, check_horizon, resolve_task
from eva_lightning.side_effects import isolated_rng, observing

Frames = npt.NDArray[np.uint8]
"""Frames of one episode, ``(T, H, W, 3)``."""

MAX_ENVIRONMENTS = 50
"""Episodes in lock-step where nothing else is asked for: every evaluation goal."""

Advance = Callable[[int], None]
"""Told how many simulator steps were taken."""


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """Results of N episodes of one task.

    Attributes:
        task: Full name of the task.
        successes: ``(N,)`` bool, solved at any step.
        final_successes: ``(N,)`` bool, solved at the last step.
        returns: ``(N,)`` float64, undiscounted sum of rewards.
        steps: Simulator steps taken in all.
        seconds: Wall-clock time, without building the environments.
        frames: Of the first episodes, if any were wanted: one frame before each step, and the last.
        cpu_seconds: Processor time in that time, of all threads and processes that took part.
    """

    task: str
    successes: npt.NDArray[np.bool_]
    final_successes: npt.NDArray[np.bool_]
    returns: npt.NDArray[np.float64]
    steps: int
    seconds: float
    frames: list[Frames] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.successes)

    @property
    def success_rate(self) -> float:
        """Share of the episodes solved at any step."""
        return float(self.successes.mean())

    @property
    def final_success_rate(self) -> float:
        """Share of the episodes solved at the last step."""
        return float(self.final_successes.mean())

    @property
    def mean_return(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @classmethod
    def join(cls, parts: Sequence[RolloutResult], seconds: float) -> RolloutResult:
        """The episodes of all `parts`, which are of one task, in order."""
        return cls(
            parts[0].task,
            np.concatenate([part.successes for part in parts]),
            np.concatenate([part.final_successes for part in parts]),
            np.concatenate([part.returns for part in parts]),
            sum(part.steps for part in parts),
            seconds,
            [frames for part in parts for frames in part.frames],
            sum(part.cpu_seconds for part in parts),
        )


@dataclass(frozen=True)
class _Plan:
    """What :func:`evaluate` is asked for; see there."""

    task: str
    target_return: float
    seed: int
    mode: Mode
    context: int | None
    environments: int | None
    horizon: int
    video_episodes: int
    video_size: int


def evaluate(
    module: DecisionTransformerModule,
    task: str,
    *,
    target_return: float,
    episodes: int = 50,
    seed: int = 0,
    mode: Mode = "exact",
    context: int | None = None,
    environments: int | None = None,
    horizon: int = HORIZON,
    workers: int = 0,
    video_episodes: int = 0,
    video_size: int = 240,
    progress: bool = False,
) -> RolloutResult:
    """Roll out `module` on evaluation goals.

    Episode i has evaluation goal i of `seed` (modulo 50) and the policy has no randomness: the same arguments give the
    same episodes, bit for bit on one machine with the same number of threads. Another number of environments or
    workers, and adapters that are merged or not, round the network's outputs otherwise: the first steps agree to six
    digits, and where the simulator is chaotic an episode may then end otherwise. Nothing of the module changes, neither
    do the global generators. The module is rolled out with its adapters merged into a copy, where they can be.

    Args:
        module: The module, with or without adapters.
        task: Task, such as ``push-v3``.
        target_return: Return the policy is asked for; the paper takes the largest in the task's data.
        episodes: Number of episodes.
        seed: Seed of the goals.
        mode, context: See :class:`~eva_lightning.rl.policy.DecisionTransformerPolicy`.
        environments: Episodes in lock-step, one network call for all, in each process; all of them for None, but at
            most 50. One takes 25 MB.
        horizon: Steps per episode, at most 500.
        workers: Processes, each with environments and a copy of the module on the CPU; 0 for this process. Pays with
            more cores than the network uses.
        video_episodes: Record so many of the first episodes, where this machine can render.
        video_size: Height and width of their frames, in pixels.
        progress: Show a progress bar.

    Raises:
        InputError: An argument is out of range, or video is wanted and this machine cannot render.
    """
    task = resolve_task(task)
    check_horizon(horizon)
    whole = {"episodes": episodes, "workers": workers, "video_episodes": video_episodes}
    whole |= {} if environments is None else {"environments": environments}
    for name, value in whole.items():
        check_number(name, value, at_least=int(name in ("episodes", "environments")), whole=True)
    if video_episodes and rendering_backend() is None:
        raise InputError(no_video_reason())
    plan = _Plan(task, target_return, seed, mode, context, environments, horizon, video_episodes, video_size)
    with _progress_bar(progress, task, episodes * horizon) as advance:
        if workers == 0 or episodes == 1:
            return _roll_out(module, plan, range(episodes), advance)
        shares = [share.tolist() for share in np.array_split(range(episodes), min(workers, episodes))]
        parts = _in_processes(module, plan, shares, advance)
    return RolloutResult.join(parts, max(part.seconds for part in parts))


def _roll_out(
    module: DecisionTransformerModule, plan: _Plan, episodes: Sequence[int], advance: Advance
) -> RolloutResult:
    """Some of the episodes, by number, in this process."""
    # as many batches as are needed, of one size as far as that goes
    batches = math.ceil(len(episodes) / (plan.environments or MAX_ENVIRONMENTS))
    chunks = [chunk.tolist() for chunk in np.array_split(episodes, batches)]  # the first is the longest
    filmed = sum(episode < plan.video_episodes for episode in episodes)
    with ExitStack() as stack:
        # a module that trains comes with its modes, and metaworld draws from NumPy's global generator
        stack.enter_context(isolated_rng())
        stack.enter_context(observing(module))
        # checks target and context before anything is built
        network = _without_adapters(module)
        policy = DecisionTransformerPolicy(network, len(chunks[0]), plan.target_return, plan.mode, plan.context)
        envs = []
        for index in range(len(chunks[0])):
            size = plan.video_size if index < filmed else None
            env = MetaWorldEnvironment(plan.task, seed=plan.seed, split="eval", horizon=plan.horizon, render_size=size)
            envs.append(stack.enter_context(env))
        started, cpu_started = time.perf_counter(), time.process_time()
        parts = []
        for chunk in chunks:
            if len(chunk) < policy.n_environments:
                policy = DecisionTransformerPolicy(network, len(chunk), plan.target_return, plan.mode, plan.context)
            parts.append(_lock_step(policy, envs[: len(chunk)], chunk, plan, advance))
        whole = RolloutResult.join(parts, time.perf_counter() - started)
        return replace(whole, cpu_seconds=time.process_time() - cpu_started)


def _without_adapters(module: DecisionTransformerModule) -> DecisionTransformerModule:
    """The same function without adapters, which take more time than what they adapt: `module`, or a copy."""
    if not has_adapters(module):
        return module
    twin = copy.deepcopy(_without_trainer(module))
    try:
        merge_and_unload(twin.model)
    except InputError:  # such as diverged weights, or a layer of the user's own
        return module
    return twin


def _lock_step(
    policy: DecisionTransformerPolicy,
    envs: Sequence[MetaWorldEnvironment],
    episodes: Sequence[int],
    plan: _Plan,
    advance: Advance,
) -> RolloutResult:
    """One episode in each environment."""
    n = len(envs)
    successes, final = np.zeros(n, bool), np.zeros(n, bool)
    returns = np.zeros(n)
    policy.reset()
    observations = np.stack([env.reset(episode) for env, episode in zip(envs, episodes, strict=True)])  # (n, 39)
    rewards: npt.NDArray[np.float64] | None = None
    films = [[env.render()] for env, number in zip(envs, episodes, strict=True) if number < plan.video_episodes]
    for _ in range(plan.horizon):
        actions = policy.act(observations, rewards)  # (n, 4)
        rewards = np.empty(n)
        for k, env in enumerate(envs):
            observations[k], rewards[k], final[k], _ = env.step(actions[k])
            if k < len(films):  # the first episodes are filmed
                films[k].append(env.render())
        successes |= final
        returns += rewards
        advance(n)
    frames = [np.stack(film) for film in films]
    return RolloutResult(plan.task, successes, final, returns, n * plan.horizon, 0.0, frames)


def _in_processes(
    module: DecisionTransformerModule, plan: _Plan, shares: Sequence[Sequence[int]], advance: Advance
) -> list[RolloutResult]:
    """One process per share, with a copy of the module on the CPU."""
    twin = copy.deepcopy(_without_trainer(module)).cpu()
    with process_pool(len(shares)) as pool:
        futures = [pool.submit(_share, twin, plan, share) for share in shares]
        for future in futures:
            advance(future.result().steps)
        return [future.result() for future in futures]


def _share(module: DecisionTransformerModule, plan: _Plan, episodes: Sequence[int]) -> RolloutResult:
    return _roll_out(module, plan, episodes, lambda steps: None)


def _without_trainer(module: DecisionTransformerModule) -> DecisionTransformerModule:
    """The same layers in another shell: a trainer, with its data loaders and loggers, cannot go to other processes."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for name in ("_trainer", "_fabric"):
        vars(twin)[name] = None
    for name in ("on_save_checkpoint", "on_load_checkpoint", "configure_model"):
        vars(twin).pop(name, None)
    return twin


@contextmanager
def _progress_bar(shown: bool, task: str, steps: int) -> Iterator[Advance]:
    """A progress bar over simulator steps, or none; gives a function that moves it on."""
    with Progress(transient=True, disable=not shown) as bar:
        row = bar.add_task(f"rollouts of {task}", total=steps)
        yield lambda steps: bar.advance(row, steps)
