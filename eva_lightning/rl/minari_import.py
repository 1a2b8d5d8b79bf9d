"""Any Minari data set of vectors as trajectories to train on, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import minari
import numpy as np
import numpy.typing as npt
from minari.storage import get_dataset_path

from eva_lightning.errors import InputError, InputTypeError, MissingInputError
from eva_lightning.reading import in_short, reading
from eva_lightning.rl.spaces import Interface
from eva_lightning.rl.trajectory_arrays import Trajectories

Single = npt.NDArray[np.float32]


def open_minari(dataset: str | minari.MinariDataset) -> minari.MinariDataset:
    """A data set of Minari's local folder by its id; one that is open already is returned as it is.

    Raises:
        MissingInputError: There is none of that id; says how to get it.
        InputError: The id or the data set is damaged, or is none.
    """
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    if not isinstance(dataset, str):
        raise InputTypeError(f"a Minari data set must be given by its id or as a MinariDataset, got {dataset!r}")
    try:
        return minari.load_dataset(dataset)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"there is no Minari data set {dataset!r} in {get_dataset_path()}: download it with minari download "
            f"{dataset}, or set MINARI_DATASETS_PATH to the folder that has it"
        ) from error
    except ImportError as error:
        raise InputError(f"the Minari data set {dataset!r} needs another package: {in_short(error)}") from error
    except Exception as error:
        raise InputError(f"the Minari data set {dataset!r} cannot be opened ({in_short(error)})") from error


def read_minari(dataset: minari.MinariDataset) -> Trajectories:
    """All episodes of a data set that have a step, in its order, as one task with the data set's id for a name.

    States are the observations, or of a Dict with ``observation`` those and ``desired_goal``. An action's bounds are
    those of the space; where that has none, the range of the actions at hand.

    Raises:
        InputError: Observations or actions are no vectors, a number is not finite, or there is no step.
    """
    interface = Interface.of(dataset.observation_space, dataset.action_space, dataset.id)
    states, actions, scalars = [], [], []
    for number, (observed, acted, rewards) in enumerate(_episodes(dataset, interface)):
        if not all(np.isfinite(array).all() for array in (observed, acted, rewards)):
            raise InputError(f"episode {number} of {dataset.id} has numbers that are not finite: leave it out")
        if not len(rewards):
            continue
        to_go = rewards[::-1].cumsum()[::-1]
        states.append(observed.astype(np.float32))
        actions.append(acted.astype(np.float32))
        scalars.append(np.stack((rewards, to_go), axis=-1).astype(np.float32))
    if not states:
        raise InputError(f"the Minari data set {dataset.id} has no episode with a step")
    lengths = np.array([len(episode) for episode in scalars], dtype=np.int64)
    together = np.concatenate(actions)
    return Trajectories(
        (dataset.id,),
        np.concatenate(states),
        together,
        np.concatenate(scalars),
        starts=lengths.cumsum() - lengths,
        lengths=lengths,
        task_of=np.zeros(len(lengths), dtype=np.int64),
        bounds=_bounds(interface, together),
    )


def _episodes(
    dataset: minari.MinariDataset, interface: Interface
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float64]]]:
    """States ``(T, state_dim)``, actions ``(T, action_dim)`` and rewards ``(T,)`` of each episode."""
    episodes = iter(dataset.iterate_episodes())
    while True:
        # the reader's work alone: what goes wrong in it is the file's fault
        with reading(dataset.storage.data_path, what="Minari data set"):
            episode = next(episodes, None)
            if episode is None:
                return
            steps = len(episode)
            rewards = np.asarray(episode.rewards, dtype=np.float64).reshape(steps)
            # the observation after the last action has no action
            observed = interface.states(episode.observations)[:steps].reshape(steps, interface.state_dim)
            acted = np.asarray(episode.actions).reshape(steps, interface.action_dim)
        yield observed, acted, rewards


def _bounds(interface: Interface, actions: Single) -> tuple[list[float], list[float]]:
    """Lowest and highest action: the space's, or where it has none those in `actions` ``(rows, action_dim)``."""
    ends = (interface.low, actions.min(axis=0)), (interface.high, actions.max(axis=0))
    low, high = (np.where(np.isfinite(bound), bound, found).tolist() for bound, found in ends)
    return low, high
