"""Where rollouts take place: goals of a Meta-World task, or episodes of any Gymnasium environment by their seeds."""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import gymnasium

from eva_lightning.errors import InputError, InputTypeError, check_number
from eva_lightning.rl.environments import MetaWorldEnvironment
from eva_lightning.rl.rendering import no_video_reason, rendering_backend
from eva_lightning.rl.spaces import name_of
from eva_lightning.rl.tasks import HORIZON, TASKS, check_horizon, resolve_task

Environment = gymnasium.Env[Any, Any]
MakeEnvironment = Callable[[], Environment]

_EXAMPLE = "lambda: gymnasium.make('HalfCheetah-v5')"


@dataclass(frozen=True)
class Goals:
    """The evaluation goals of a Meta-World task: episode i has goal i.

    Attributes:
        task: Full name of the task.
        seed: Seed of the goals.
        horizon: Steps per episode.
        video_size: Height and width of frames, in pixels.
    """

    task: str
    seed: int
    horizon: int
    video_size: int

    def check(self, video_episodes: int, workers: int) -> None:
        """Refuse what cannot be done.

        Raises:
            InputError: The horizon is out of range, or video is wanted and this machine cannot render.
        """
        check_horizon(self.horizon)
        if video_episodes and rendering_backend() is None:
            raise InputError(no_video_reason())

    def make(self, filmed: bool) -> Environment:
        """An environment."""
        return MetaWorldEnvironment(
            self.task,
            seed=self.seed,
            split="eval",
            horizon=self.horizon,
            render_mode="rgb_array" if filmed else None,
            render_size=self.video_size,
        )

    def reset(self, environment: Environment, episode: int) -> Any:
        """The first observation of an episode."""
        return environment.reset(options={"goal": episode})[0]


@dataclass(frozen=True)
class Seeds:
    """Episodes of any environment: episode i begins with ``reset(seed=seed + i)``.

    Attributes:
        make_env: Makes a new environment at each call.
        seed: Seed of episode 0.
        horizon: Steps after which an episode is stopped; None for none but the environment's own.
    """

    make_env: MakeEnvironment
    seed: int
    horizon: int | None

    def check(self, video_episodes: int, workers: int) -> None:
        """Refuse what cannot be done.

        Raises:
            InputError: `make_env` is no function or cannot go to other processes, or a number is out of range.
        """
        if not callable(self.make_env):
            raise InputTypeError(
                f"make_env must be a function that makes an environment, such as {_EXAMPLE}, an id, or the "
                f"name of a Meta-World task, got {self.make_env!r}"
            )
        check_number("seed", self.seed, at_least=0, whole=True)
        if self.horizon is not None:
            check_number("horizon", self.horizon, at_least=1, whole=True)
        if workers:
            try:
                pickle.dumps(self.make_env)
            except Exception as error:
                raise InputError(
                    "with workers, make_env must be something that goes to other processes, such as "
                    f"functools.partial(gymnasium.make, 'HalfCheetah-v5'), got {self.make_env!r}"
                ) from error
        if video_episodes:
            rendering_backend()  # sets MuJoCo's, which must come before the first frame; others draw without it

    def make(self, filmed: bool) -> Environment:
        """An environment.

        Raises:
            InputError: It is none, or is to be filmed and does not render.
        """
        environment = self.make_env()
        if not isinstance(environment, gymnasium.Env):
            raise InputTypeError(f"make_env must return a gymnasium.Env, got {environment!r}")
        if filmed and environment.render_mode != "rgb_array":
            environment.close()
            raise InputError(
                f"frames of {name_of(environment)} need render_mode='rgb_array', got {environment.render_mode!r}: give "
                "it to gymnasium.make"
            )
        return environment

    def reset(self, environment: Environment, episode: int) -> Any:
        """The first observation of an episode."""
        return environment.reset(seed=self.seed + episode)[0]


def resolve_environment(name: str) -> str:
    """The full name of a Meta-World task, or an id as ``gymnasium.make`` takes it.

    In ``module:id``, the module is imported first: it registers the environment.

    Raises:
        InputError: There is no such task, and no environment of that id.
    """
    module, _, environment = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise InputError(f"the module of the environment {name!r} cannot be imported: {error}") from error
    return name if environment in gymnasium.registry else resolve_task(name, gymnasium.registry)


def scene_of(make_env: str | MakeEnvironment, seed: int, horizon: int | None, video_size: int) -> Goals | Seeds:
    """Where to roll out: a task by its name, or what a function, or ``gymnasium.make`` by an id, makes.

    Raises:
        InputError: There is no such task, and no environment of that id.
    """
    if not isinstance(make_env, str):
        return Seeds(make_env, seed, horizon)
    name = resolve_environment(make_env)
    if name in TASKS:
        return Goals(name, seed, HORIZON if horizon is None else horizon, video_size)
    return Seeds(functools.partial(gymnasium.make, name), seed, horizon)


def open_all(scene: Goals | Seeds, number: int, filmed: int, stack: ExitStack) -> list[Environment]:
    """`number` environments, of which the first `filmed` are to be filmed; `stack` closes them.

    Raises:
        InputError: See :meth:`Seeds.make`; or two are the same.
    """
    environments: list[Environment] = []
    for index in range(number):
        environment = stack.enter_context(scene.make(index < filmed))
        if any(environment is other for other in environments):
            raise InputError(f"make_env must make a new environment at each call, such as {_EXAMPLE}, got the same")
        environments.append(environment)
    return environments
