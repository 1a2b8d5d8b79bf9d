"""Success and return of a Decision Transformer, measured in Meta-World or in any Gymnasium environment.

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
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from eva_lightning.adapters import has_adapters, merge_and_unload
from eva_lightning.errors import InputError, check_number
from eva_lightning.processes import process_pool
from eva_lightning.rl.module import DecisionTransformerModule
from eva_lightning.rl.policy import DecisionTransformerPolicy, Mode
from eva_lightning.rl.rollout_environments import Environment, Goals, MakeEnvironment, Seeds, open_all, scene_of
from eva_lightning.rl.spaces import Interface, interface_of, name_of
from eva_lightning.side_effects import isolated_rng, observing

Frames = npt.NDArray[np.uint8]
"""Frames of one episode, ``(T, H, W, 3)``."""

MAX_ENVIRONMENTS = 50
"""Episodes in lock-step where nothing else is asked for: every evaluation goal."""

MAX_STEPS = 10_000
"""Steps after which an episode that should have ended by itself is given up."""

SUCCESS = ("success", "is_success")
"""Keys of a step's ``info`` that say whether the task is solved: Meta-World's and Gymnasium-Robotics'."""

Advance = Callable[[int], None]
"""Told how many simulator steps were taken."""


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """Results of N episodes of one task.

    Attributes:
        task: Full name of the task, or id of the environment.
        successes: ``(N,)`` bool, solved at any step; all False where `knows_success` is.
        final_successes: ``(N,)`` bool, solved at the last step; likewise.
        returns: ``(N,)`` float64, undiscounted sum of rewards.
        steps: Simulator steps taken in all.
        seconds: Wall-clock time, without building the environments.
        frames: Of the first episodes, if any were wanted: one frame before each step, and the last.
        cpu_seconds: Processor time in that time, of all threads and processes that took part.
        lengths: ``(N,)`` int64, steps of each episode.
        knows_success: Whether the environment says that its task is solved (``info["success"]`` or ``is_success``).
    """

    task: str
    successes: npt.NDArray[np.bool_]
    final_successes: npt.NDArray[np.bool_]
    returns: npt.NDArray[np.float64]
    steps: int
    seconds: float
    frames: list[Frames] = field(default_factory=list)
    cpu_seconds: float = 0.0
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    knows_success: bool = True

    def __len__(self) -> int:
        return len(self.successes)

    @property
    def success_rate(self) -> float:
        """Share of the episodes solved at any step; NaN where it is not known."""
        return float(self.successes.mean()) if self.knows_success else math.nan

    @property
    def final_success_rate(self) -> float:
        """Share of the episodes solved at the last step; NaN where it is not known."""
        return float(self.final_successes.mean()) if self.knows_success else math.nan

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
            np.concatenate([part.lengths for part in parts]),
            any(part.knows_success for part in parts),
        )


@dataclass(frozen=True)
class _Plan:
    """What :func:`evaluate` is asked for; see there."""

    scene: Goals | Seeds
    target_return: float
    mode: Mode
    context: int | None
    environments: int | None
    video_episodes: int


def evaluate(
    module: DecisionTransformerModule,
    make_env: str | MakeEnvironment,
    *,
    target_return: float | None = None,
    episodes: int = 50,
    seed: int = 0,
    mode: Mode = "exact",
    context: int | None = None,
    environments: int | None = None,
    horizon: int | None = None,
    workers: int = 0,
    video_episodes: int = 0,
    video_size: int = 240,
    progress: bool = False,
) -> RolloutResult:
    """Roll out `module` in any Gymnasium environment, or on the evaluation goals of a Meta-World task.

    Episode i begins with ``reset(seed=seed + i)``, or has evaluation goal i of `seed` (modulo 50), and the policy has
    no randomness: the same arguments give the same episodes, bit for bit on one machine with the same number of
    threads. Another number of environments or workers, and adapters that are merged or not, round the network's outputs
    otherwise: the first steps agree to six digits, and where the simulator is chaotic an episode may then end
    otherwise. Nothing of the module changes, neither do the global generators. The module is rolled out with its
    adapters merged into a copy, where they can be.

    Example::

        evaluate(module, "push-v3", target_return=1585.0)
        evaluate(module, lambda: gymnasium.make("HalfCheetah-v5"), episodes=10, seed=1000)
        evaluate(module, minari.load_dataset("mujoco/halfcheetah/expert-v0").recover_environment)

    Args:
        module: The module, with or without adapters.
        make_env: Makes a new environment at each call, whose observations are a Box of one axis (or a Dict with such an
            ``observation``) and whose actions are a Box of one axis; or an id that ``gymnasium.make`` knows; or a
            Meta-World task, such as ``push-v3``.
        target_return: Return the policy is asked for; the paper takes the largest in the task's data. None for the
            module's own ``target_return``.
        episodes: Number of episodes.
        seed: Seed of the first episode, or of the goals.
        mode, context: See :class:`~eva_lightning.rl.policy.DecisionTransformerPolicy`.
        environments: Episodes in lock-step, one network call for all, in each process; all of them for None, but at
            most 50. One of Meta-World's takes 25 MB.
        horizon: Steps after which an episode is stopped, where it has not ended by itself. None for what the
            environment does, and 200 in Meta-World, which takes at most 500.
        workers: Processes, each with environments and a copy of the module on the CPU; 0 for this process. Pays with
            more cores than the network uses.
        video_episodes: Record so many of the first episodes, where this machine can render. `make_env` must then make
            environments with ``render_mode="rgb_array"``.
        video_size: Height and width of Meta-World's frames, in pixels.
        progress: Show a progress bar.

    Raises:
        InputError: An argument is out of range, the environment has other sizes than the module or other spaces than
            vectors, an episode does not end, or video is wanted and cannot be rendered.
    """
    scene = scene_of(make_env, seed, horizon, video_size)
    whole = {"episodes": episodes, "workers": workers, "video_episodes": video_episodes}
    whole |= {} if environments is None else {"environments": environments}
    for name, value in whole.items():
        check_number(name, value, at_least=int(name in ("episodes", "environments")), whole=True)
    scene.check(video_episodes, workers)
    target = module.hparams.get("target_return") if target_return is None else target_return
    if target is None:
        raise InputError("target_return is needed, the return to ask for, as the module has none of its own: got None")
    plan = _Plan(scene, target, mode, context, environments, video_episodes)
    with _progress_bar(progress, scene, episodes) as advance:
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
        envs = open_all(plan.scene, len(chunks[0]), filmed, stack)
        interface = _fitting(module, envs[0])
        started, cpu_started = time.perf_counter(), time.process_time()
        parts = []
        for chunk in chunks:
            if len(chunk) != policy.n_environments:
                policy = DecisionTransformerPolicy(network, len(chunk), plan.target_return, plan.mode, plan.context)
            parts.append(_lock_step(policy, envs[: len(chunk)], interface, chunk, plan, advance))
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


def _fitting(module: DecisionTransformerModule, environment: Environment) -> Interface:
    """The interface of an environment, once it fits the module.

    Raises:
        InputError: States or actions are of other sizes, or no vectors.
    """
    interface = interface_of(environment)
    sizes = {
        "observations": (interface.state_dim, module.model.state_dim),
        "actions": (interface.action_dim, module.model.action_dim),
    }
    for name, (there, here) in sizes.items():
        if there != here:
            raise InputError(f"the {name} of {name_of(environment)} have {there} numbers, and the module's have {here}")
    return interface


class _Tally:
    """What is counted of `n` episodes."""

    def __init__(self, n: int) -> None:
        self.successes, self.final = np.zeros(n, bool), np.zeros(n, bool)
        self.returns, self.lengths = np.zeros(n), np.zeros(n, np.int64)
        self.knows_success = False

    def add(self, k: int, reward: float, info: dict[str, Any]) -> None:
        """Count a step of episode k."""
        self.returns[k] += reward
        self.lengths[k] += 1
        self.final[k] = False
        for key in SUCCESS:
            if key in info:
                self.knows_success = True
                self.final[k] = bool(info[key])
                break
        self.successes[k] |= self.final[k]

    def result(self, task: str, frames: list[Frames]) -> RolloutResult:
        """All of it, without times."""
        steps = int(self.lengths.sum())
        return RolloutResult(
            task, self.successes, self.final, self.returns, steps, 0.0, frames,
            lengths=self.lengths, knows_success=self.knows_success,
        )  # fmt: skip


def _lock_step(
    policy: DecisionTransformerPolicy,
    envs: Sequence[Environment],
    interface: Interface,
    episodes: Sequence[int],
    plan: _Plan,
    advance: Advance,
) -> RolloutResult:
    """One episode in each environment; those that have ended wait until half of the policy's have."""
    scene, tally = plan.scene, _Tally(len(envs))
    policy.reset()
    states = np.stack([interface.states(scene.reset(*pair)) for pair in zip(envs, episodes, strict=True)])
    states = states.astype(np.float64)  # (n, state_dim)
    rewards: npt.NDArray[np.float64] | None = None
    films = [[_frame(env)] for env, number in zip(envs, episodes, strict=True) if number < plan.video_episodes]
    rows, going = list(range(len(envs))), set(range(len(envs)))  # of the policy; environments whose episodes go on
    while going:
        actions = interface.actions(policy.act(states, rewards))  # (n, action_dim)
        rewards = np.zeros(len(rows))
        advance(len(going))
        for row, k in enumerate(rows):
            if k not in going:
                continue
            observation, reward, terminated, truncated, info = envs[k].step(actions[row])
            states[row], rewards[row] = interface.states(observation), reward
            tally.add(k, rewards[row], info)
            if k < len(films):  # the first episodes are filmed
                films[k].append(_frame(envs[k]))
            if terminated or truncated or _is_enough(int(tally.lengths[k]), scene, envs[k]):
                going.remove(k)
        if 0 < 2 * len(going) <= len(rows):
            kept = [row for row, k in enumerate(rows) if k in going]
            policy.keep(kept)
            rows, states, rewards = [rows[row] for row in kept], states[kept], rewards[kept]
    task = scene.task if isinstance(scene, Goals) else name_of(envs[0])
    return tally.result(task, [np.stack(film) for film in films])


def _is_enough(steps: int, scene: Goals | Seeds, environment: Environment) -> bool:
    """Whether an episode that has not ended by itself is stopped.

    Raises:
        InputError: It does not end, and nothing says when to stop it.
    """
    if scene.horizon is None and steps >= MAX_STEPS:
        raise InputError(
            f"an episode of {name_of(environment)} has not ended after {steps:,} steps: give a horizon, or "
            "max_episode_steps to gymnasium.make"
        )
    return steps == scene.horizon


def _frame(environment: Environment) -> Frames:
    """A frame ``(H, W, 3)`` of the present state."""
    return np.asarray(environment.render(), dtype=np.uint8)


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
def _progress_bar(shown: bool, scene: Goals | Seeds, episodes: int) -> Iterator[Advance]:
    """A progress bar over simulator steps, or none; gives a function that moves it on."""
    name = scene.task if isinstance(scene, Goals) else "an environment"
    with Progress(transient=True, disable=not shown) as bar:
        row = bar.add_task(f"rollouts of {name}", total=None if scene.horizon is None else episodes * scene.horizon)
        yield lambda steps: bar.advance(row, steps)
