"""What a Decision Transformer needs to know of an environment's spaces: sizes, bounds, and states as vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Dict, Space

from eva_lightning.errors import InputError

#: Parts of a goal environment's observation that are its state, in this order: what is achieved follows from them.
_PARTS = ("observation", "desired_goal")
#: Bounds beyond this are none: some environments write a large number for infinity.
_LARGEST_BOUND = 1e6


@dataclass(frozen=True, eq=False)
class Interface:
    """States in, actions out, as vectors.

    Attributes:
        state_dim: Length of a state.
        parts: Keys of the observation whose values, one after the other, are the state; empty where the observation is
            the state.
        low, high: ``(action_dim,)`` float64 bounds of the action, infinite where it has none.
        action_dtype: Type of number that the environment takes.
    """

    state_dim: int
    parts: tuple[str, ...]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    action_dtype: np.dtype[Any]

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        return len(self.low)

    @classmethod
    def of(cls, observations: Space[Any], actions: Space[Any], name: str) -> Interface:
        """The interface of an environment, or data set, called `name`.

        Raises:
            InputError: A state or an action is no vector of numbers.
        """
        parts: tuple[str, ...] = ()
        boxes = [observations]
        if isinstance(observations, Dict) and _PARTS[0] in observations.spaces:
            parts = tuple(part for part in _PARTS if part in observations.spaces)
            boxes = [observations.spaces[part] for part in parts]
        sizes = [int(np.prod(box.shape)) for box in boxes if box.shape is not None and _is_vector(box)]
        if len(sizes) < len(boxes):
            raise InputError(
                f"the observations of {name} must be a Box of one axis, or a Dict with such an 'observation', got "
                f"{observations}: gymnasium.wrappers.FlattenObservation makes them one"
            )
        if not _is_vector(actions) or not np.issubdtype(actions.dtype, np.floating):
            raise InputError(f"the actions of {name} must be a Box of one axis (continuous actions), got {actions}")
        assert isinstance(actions, Box)
        low, high = (np.asarray(bound, dtype=np.float64) for bound in (actions.low, actions.high))
        bounded = [np.where(np.abs(bound) < _LARGEST_BOUND, bound, np.sign(bound) * np.inf) for bound in (low, high)]
        return cls(sum(sizes), parts, bounded[0], bounded[1], np.dtype(actions.dtype))

    def states(self, observations: Any) -> npt.NDArray[Any]:
        """Observations, one or one per row in each part, as states ``(state_dim,)`` or ``(n, state_dim)``."""
        if not self.parts:
            return np.asarray(observations)
        return np.concatenate([np.asarray(observations[part]) for part in self.parts], axis=-1)

    def actions(self, actions: npt.NDArray[np.floating]) -> npt.NDArray[Any]:
        """A policy's actions ``(n, action_dim)`` as elements of the environment's space: within bounds, of its type."""
        return np.clip(actions, self.low, self.high).astype(self.action_dtype)


def interface_of(environment: gymnasium.Env[Any, Any]) -> Interface:
    """The interface of an environment.

    Raises:
        InputError: A state or an action is no vector of numbers.
    """
    return Interface.of(environment.observation_space, environment.action_space, name_of(environment))


def name_of(environment: gymnasium.Env[Any, Any]) -> str:
    """What an environment is called: its id, or its class where it was made without one."""
    spec = environment.spec
    return type(environment.unwrapped).__name__ if spec is None else str(spec.id)


def _is_vector(space: Space[Any]) -> bool:
    return isinstance(space, Box) and len(space.shape) == 1 and space.shape[0] > 0
