"""Episodes one after the other in arrays, read as windows: one vectorised read per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Batch = dict[str, Tensor]


class Trajectories:
    """The steps of one or several tasks' episodes, which may differ in length.

    Args:
        tasks: Names of the tasks.
        states: ``(rows, state_dim)``, a row for each step, each episode's one after the other.
        actions: ``(rows, action_dim)``, as executed, or with the expert's clean ones beside them.
        scalars: ``(rows, 2)`` float32: reward and return-to-go.
        starts, lengths: ``(n_episodes,)`` first row and number of steps of each episode.
        task_of: ``(n_episodes,)`` index into `tasks`.
        bounds: Lowest and highest action, ``action_dim`` numbers each; None where all are in [-1, 1].

    Attributes:
        tasks, starts, lengths, task_of, bounds: As given.
        returns: ``(n_episodes,)`` float64, undiscounted.
        state_dim, action_dim: Lengths of a state and of an action.
    """

    state_dim: int
    action_dim: int

    def __init__(
        self,
        tasks: Sequence[str],
        states: Floats,
        actions: Floats,
        scalars: Floats,
        starts: Ints,
        lengths: Ints,
        task_of: Ints,
        bounds: tuple[list[float], list[float]] | None = None,
    ) -> None:
        self.tasks = tuple(tasks)
        self._states, self._actions, self._scalars = states, actions, scalars
        self.starts, self.lengths, self.task_of = starts, lengths, task_of
        self.bounds = bounds
        self.state_dim, self.action_dim = states.shape[1], actions.shape[1]
        # the return-to-go of an episode's first step
        self.returns = scalars[starts, 1].astype(np.float64)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def largest(self) -> tuple[float, float]:
        """Largest return-to-go and largest reward of all steps, by magnitude."""
        reward, to_go = (float(np.abs(self._scalars[:, k]).max()) for k in range(2))
        return to_go, reward

    def states(self, episode: int) -> Floats:
        """States ``(T, state_dim)`` of an episode: a view, where the steps are kept as they are."""
        return self._read_states(np.arange(self.starts[episode], self.starts[episode] + self.lengths[episode]))

    def window(self, episode: int, first: int, steps: int) -> dict[str, npt.NDArray[Any]]:
        """Steps of an episode as views, nothing copied: ``states`` ``(n, state_dim)``, ``actions`` and
        ``target_actions`` (of no column where there are none) ``(n, action_dim)``, ``rewards`` and ``returns_to_go``
        ``(n,)``.

        Args:
            episode: Number of the episode.
            first: First step.
            steps: Number of steps; fewer come at the end of the episode.
        """
        begin = int(self.starts[episode]) + first
        rows = slice(begin, min(begin + steps, int(self.starts[episode] + self.lengths[episode])))
        return {
            "states": self._states[rows],
            "actions": self._actions[rows, : self.action_dim],
            "target_actions": self._actions[rows, self.action_dim :],
            "rewards": self._scalars[rows, 0],
            "returns_to_go": self._scalars[rows, 1],
        }

    def gather(self, episodes: Ints, first: Ints, lengths: Ints, context: int, target: str = "executed") -> Batch:
        """Windows as one batch, float32, left-aligned: padding, all zeros, comes after the real steps.

        Args:
            episodes: ``(B,)`` episode of each window.
            first: ``(B,)`` first step of each window within its episode.
            lengths: ``(B,)`` real steps of each window.
            context: Steps of a window, K.
            target: ``"expert"`` adds the expert's clean actions.

        Returns:
            ``states`` ``(B, K, state_dim)``, ``actions`` ``(B, K, action_dim)``, ``rewards``, ``returns_to_go``
            ``(B, K)`` float32, ``timesteps`` ``(B, K)`` int64, ``mask`` ``(B, K)`` bool and, for ``"expert"``,
            ``target_actions``.
        """
        steps = np.arange(context)  # (K,)
        mask = steps < lengths[:, None]  # (B, K)
        rows = (self.starts[episodes] + first)[:, None] + steps  # (B, K)
        states = self._read_states(rows)  # (B, K, state_dim)
        actions = self._actions.take(rows, axis=0, mode="clip")  # (B, K, executed and the expert's)
        scalars = self._scalars.take(rows, axis=0, mode="clip")  # (B, K, reward and return-to-go)
        timesteps = first[:, None] + steps  # (B, K)
        if not mask.all():
            for array in (states, actions, scalars, timesteps):
                array[~mask] = 0
        batch = {
            "states": states,
            "actions": actions[..., : self.action_dim],
            "rewards": scalars[..., 0],
            "returns_to_go": scalars[..., 1],
            "timesteps": timesteps,
            "mask": mask,
        }
        if target == "expert":
            batch["target_actions"] = actions[..., self.action_dim :]
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def _read_states(self, rows: Ints) -> Floats:
        states: Floats = self._states.take(rows, axis=0, mode="clip")
        return states
