"""One Meta-World task as this project uses it: goal visible, reward v2, goals by number, nothing else random.

Facts of metaworld 3.1 that this hides: ``reset(seed=)`` is ignored, so that goals are set through ``set_task``;
experts and policies leave [-1, 1], which changes the reward; and success can be lost again within an episode, so that
it is reported per step and judged by the caller ("at any step" throughout this project).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import gymnasium
import metaworld
import mujoco
import numpy as np
import numpy.typing as npt
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.types import Task

from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.rl.quick_simulator import quick_class
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.tasks import ACTION_DIM, HORIZON, MAX_SEED, STATE_DIM, check_horizon, resolve_task

_CAMERA = "corner2"


class MetaWorldEnvironment(gymnasium.Env[npt.NDArray[np.float64], npt.NDArray[np.floating]]):
    """A task with 50 numbered goals, as a Gymnasium environment; the same goal and actions give the same bits.

    A goal fixes where the objects start and where they have to go. Episodes are truncated after `horizon` steps and end
    for no other reason. What happened in earlier episodes has no influence.

    Goals come from ``MT1`` task lists: list ``2 * seed`` to train, list ``2 * seed + 1`` to evaluate. Evaluation goals
    of any seed are therefore disjoint from the training goals of every seed.

    ``gymnasium.make("eva_lightning/MetaWorld-push-v3", split="eval")`` makes it too, with the arguments below and
    Gymnasium's ``max_episode_steps`` (200), once :mod:`eva_lightning.rl` is imported.

    Example::

        with MetaWorldEnvironment("push-v3", split="eval") as environment:
            observation, info = environment.reset(options={"goal": 0})
            observation, reward, terminated, truncated, info = environment.step(np.zeros(4))

    Args:
        task: Task, such as ``push-v3``.
        seed: Seed of the goals, in [0, 2^31).
        split: Goals to train on or to evaluate on.
        horizon: Steps per episode, from 1 to 500.
        render_mode: ``"rgb_array"`` to render frames; None if nothing is rendered.
        render_size: Height and width of rendered frames, in pixels.

    Attributes:
        task: Full name of the task.
        horizon: As given.
        n_goals: Number of goals, 50.

    Raises:
        InputError: An argument is wrong, or frames are wanted and this machine cannot draw.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 80}  # type: ignore[misc]

    def __init__(
        self,
        task: str,
        *,
        seed: int = 0,
        split: Literal["train", "eval"] = "train",
        horizon: int = HORIZON,
        render_mode: Literal["rgb_array"] | None = None,
        render_size: int = 240,
    ) -> None:
        self.task = resolve_task(task)
        check_horizon(horizon)
        check_choice("split", split, ("train", "eval"))
        check_number("seed", seed, at_least=0, below=MAX_SEED, whole=True)
        check_number("render_size", render_size, at_least=1, whole=True)
        if render_mode is not None:
            check_choice("render_mode", render_mode, self.metadata["render_modes"])
            if rendering_backend() is None:
                raise InputError(no_video_reason())
        self.horizon = horizon
        self.render_mode = render_mode
        # objects have no bounds, and nothing says that the simulator keeps the arm's
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self._goals = _goals(self.task, 2 * seed + (split == "eval"))
        self.n_goals = len(self._goals)
        self._steps: int | None = None
        self._env: Any = _make(self.task, None if render_mode is None else render_size)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seed of the generator that draws the goal where `options` name none.
            options: ``{"goal": i}``: number of the goal, taken modulo `n_goals`.

        Returns:
            First observation ``(39,)``: 18 numbers of now, the same 18 of the previous frame, the goal's position; and
            ``{"goal": i}``.

        Raises:
            InputError: The goal is no whole number of at least 0, or the environment is closed.
        """
        super().reset(seed=seed)
        if self._env is None:
            raise InputError(f"the environment of {self.task} is closed: make another one")
        goal = (options or {}).get("goal")
        if goal is None:
            goal = self.np_random.integers(self.n_goals)
        # data sets give the options back as NumPy's numbers
        goal = int(goal) if isinstance(goal, np.integer) else goal
        check_number("the goal of options", goal, at_least=0, whole=True)
        self._env.set_task(self._goals[goal % self.n_goals])
        self._steps = 0
        observation: npt.NDArray[np.float64] = self._env.reset()[0]
        return observation, {"goal": goal % self.n_goals}

    def step(self, action: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Do one of the `horizon` steps of an episode.

        Args:
            action: ``(4,)``, clipped to [-1, 1]: movement in x, y, z and closing of the gripper.

        Returns:
            Observation ``(39,)``, reward in [0, 10], False (nothing terminates an episode), whether this was the
            episode's last step, and metaworld's measures, among them ``success``: whether the task is solved at this
            step.

        Raises:
            InputError: The episode is over or was not started, or `action` has another shape.
        """
        if self._steps is None or self._steps >= self.horizon:
            raise InputError(f"the episode of {self.task} is over after {self._steps or 0} steps: call reset")
        clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        if clipped.shape != (ACTION_DIM,):
            raise InputError(f"an action has shape ({ACTION_DIM},), got {clipped.shape}")
        observation, reward, _, _, info = self._env.step(clipped)
        self._steps += 1
        info["success"] = bool(info["success"])
        return observation, float(reward), False, self._steps >= self.horizon, info

    def render(self) -> npt.NDArray[np.uint8]:
        """A frame of the present state, ``(render_size, render_size, 3)``.

        Raises:
            InputError: The environment was made without a `render_mode`.
        """
        if self.render_mode is None:
            raise InputError("frames need a render_mode: MetaWorldEnvironment(task, render_mode='rgb_array')")
        frame: npt.NDArray[np.uint8] = self._env.render()
        # this camera is mounted upside down: half a turn, not a mirror image
        return np.ascontiguousarray(frame[::-1, ::-1])

    def close(self) -> None:
        """Free the simulator and its OpenGL context; more than once is fine."""
        if self._env is not None:
            self._env.close()
            self._env = None
            self._steps = None


def forget_goals() -> None:
    """Forget the goals drawn in this process, for timings that begin from nothing."""
    _goals.cache_clear()


def _make(task: str, render_size: int | None) -> Any:
    kind = quick_class(task)
    if render_size is None:
        return kind(reward_function_version="v2")
    camera: dict[str, Any] = {
        "render_mode": "rgb_array",
        "camera_name": _CAMERA,
        "width": render_size,
        "height": render_size,
    }
    return kind(reward_function_version="v2", **camera)


@functools.lru_cache(maxsize=128)
def _goals(task: str, seed: int) -> tuple[Task, ...]:
    """The goals of ``MT1(task, seed=seed)``.

    MT1 moves the arm to its place before it draws each goal, which takes 1.3 of its 1.6 seconds. No draw depends on
    that: here the arm stays where it is. All 50 tasks were compared once; the tests compare some.
    """
    with patch.object(ALL_V3_ENVIRONMENTS[task], "_reset_hand", _stay):
        return tuple(metaworld.MT1(task, seed=seed).train_tasks)


def _stay(environment: Any, steps: int = 50) -> None:
    mujoco.mj_forward(environment.model, environment.data)
    environment.init_tcp = environment.tcp_center
