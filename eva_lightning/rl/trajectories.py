"""Windows of demonstrations as a LightningDataModule: random ones to train on, held-out ones to validate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.rl.demonstrations import read_index
from eva_lightning.rl.tasks import TARGETS, resolve_task
from eva_lightning.rl.trajectory_arrays import Batch, Ints, Trajectories
from eva_lightning.rl.trajectory_store import TrajectoryStore

if TYPE_CHECKING:
    import minari


class WindowDataset(Dataset[Batch]):
    """Whole batches of windows by key, each a pure function of seed and key.

    A window ends at some step of an episode and goes back `context` steps, or to the episode's start. A key is
    ``(epoch, first, count)``: samples ``first`` to ``first + count`` of that epoch. With a seed, sample i of an epoch
    is a window drawn at random, from a hash of seed, epoch and i; without, windows come in order, each step in one.

    Args:
        store: The steps.
        episodes: Numbers of the episodes to take windows from.
        context: Steps of a window.
        seed: Seed of the draws, or None for windows in order.
        target: ``"executed"`` or ``"expert"``.
    """

    def __init__(
        self, store: Trajectories, episodes: Ints, context: int, seed: int | None, target: str = "executed"
    ) -> None:
        self.store = store
        self.episodes = episodes
        self.context = context
        self.seed = seed
        self.target = target
        if seed is None:
            # every step once: windows end at multiples of the context, and at the last step
            ends = [np.append(np.arange(context, t, context), t) - 1 for t in store.lengths[episodes]]
            self._episode = np.repeat(episodes, [len(each) for each in ends])
            self._end = np.concatenate(ends)
            self._first = np.concatenate([np.append(0, each[:-1] + 1) for each in ends])
            self._n = len(self._end)
        else:
            self._bounds = np.cumsum(store.lengths[episodes])
            self._n = int(self._bounds[-1])

    def __len__(self) -> int:
        """Number of different windows."""
        return self._n

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        """The batch of a key, with the ``task`` index ``(B,)`` of each window where windows come in order."""
        epoch, first, count = key
        samples = np.arange(first, first + count)
        if self.seed is None:
            episodes, begin, end = self._episode[samples], self._first[samples], self._end[samples]
        else:
            number = _random(self.seed, epoch, samples) % np.uint64(self._n)
            where = np.searchsorted(self._bounds, number.astype(np.int64), side="right")
            episodes = self.episodes[where]
            end = number.astype(np.int64) - (self._bounds[where] - self.store.lengths[episodes])
            begin = np.maximum(end - self.context + 1, 0)
        batch = self.store.gather(episodes, begin, end - begin + 1, self.context, self.target)
        if self.seed is None:
            batch["task"] = torch.from_numpy(self.store.task_of[episodes])
        return batch


def _random(seed: int, epoch: int, samples: Ints) -> npt.NDArray[np.uint64]:
    """64 random bits for each sample, from seed, epoch and the sample's number alone (SplitMix64)."""
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
    with np.errstate(over="ignore"):
        z = key + (samples.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


class BatchKeys(Sampler[tuple[int, int, int]]):
    """Keys of an epoch's batches, in order; a resumed epoch continues where it stopped.

    Args:
        n_samples: Samples of an epoch.
        batch_size: Samples per batch; the last may have fewer unless `drop_last`.
        drop_last: Leave out a last, smaller batch.
        rank, world_size: This process takes every `world_size`-th batch.
        done: Asked at the start of an epoch: how many batches this process has had, over all epochs. It continues
            from there; without, it gives the whole epoch that was set.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        done: Callable[[], int] | None = None,
    ) -> None:
        self.n_samples, self.batch_size = n_samples, batch_size
        self.rank, self.world_size = rank, world_size
        total = n_samples // batch_size if drop_last else -(-n_samples // batch_size)
        self.n_batches = (total - rank + world_size - 1) // world_size if not drop_last else total // world_size
        self.done = done
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        # not by Lightning's number of the epoch: it counts one that was left in the middle as a whole one
        epoch, begin = (self.epoch, 0) if self.done is None else divmod(self.done(), self.n_batches)
        for batch in range(begin, self.n_batches):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield epoch, first, min(self.batch_size, self.n_samples - first)


class ResumableLoader(DataLoader[Batch]):
    """Tells Lightning that it can resume in the middle of an epoch: its keys know where (:class:`BatchKeys`)."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's progress is enough."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""


class TrajectoryDataModule(L.LightningDataModule):
    """Windows of demonstrations of one or several tasks, in raw units, for :class:`DecisionTransformerModule`.

    The last `val_episodes` of each task are held out: their windows, in order and without overlap, are the validation
    data, with a ``task`` index into ``tasks``. Training windows are drawn at random from the others, a sample being a
    pure function of seed, epoch and its number: the same with any number of `workers`, and a checkpoint taken in the
    middle of an epoch resumes with the batch that would have come next. With several devices pass
    ``use_distributed_sampler=False`` to the trainer; each takes batches of its own.

    Args:
        folder: Folder of demonstrations, or trajectories in memory, which :meth:`from_minari` reads.
        tasks: Names of tasks; trajectories in memory have their own.
        context: Steps of a window, K.
        batch_size: Windows per training batch.
        episodes: Training episodes per task; None for all but the held-out ones.
        val_episodes: Held-out episodes per task, the last ones; 0 for no validation.
        eval_batch_size: Windows per validation batch.
        seed: Seed of the draws.
        workers: Loader processes; 0 is fastest, for a batch takes well under a millisecond.
        cache_dir, dtype, drop_previous_frame: See :meth:`TrajectoryStore.build`.
        samples_per_epoch: Windows per epoch; None for as many as there are.
        target: ``"executed"`` (the actions that led to what followed) or ``"expert"`` (adds ``target_actions``, clean).

    Raises:
        MissingInputError: Demonstrations are missing.
        InputError: A value is out of range or a name unknown.
    """

    def __init__(
        self,
        folder: str | Path | Trajectories,
        tasks: Sequence[str] = (),
        context: int = 10,
        batch_size: int = 64,
        episodes: int | None = None,
        val_episodes: int = 4,
        eval_batch_size: int = 256,
        seed: int = 0,
        workers: int = 0,
        cache_dir: str | Path | None = None,
        dtype: str = "float32",
        drop_previous_frame: bool = False,
        samples_per_epoch: int | None = None,
        target: str = "executed",
    ) -> None:
        super().__init__()
        for name, value in (("context", context), ("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            check_number(name, value, at_least=1, whole=True)
        for name, value in (("val_episodes", val_episodes), ("workers", workers)):
            check_number(name, value, at_least=0, whole=True)
        if episodes is not None:
            check_number("episodes", episodes, at_least=1, whole=True)
        if samples_per_epoch is not None:
            check_number("samples_per_epoch", samples_per_epoch, at_least=batch_size, whole=True)
        check_choice("target", target, TARGETS)
        if isinstance(folder, Trajectories):
            if target == "expert":
                raise InputError("these trajectories have executed actions and no expert's: use target executed")
            self.store = folder
        else:
            self.folder = Path(folder)
            self.store = _stored(self.folder, tasks, target, cache_dir, dtype, drop_previous_frame)
        self.tasks = self.store.tasks
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.workers = workers
        self.target = target
        self._train, self._val = self._split(episodes, val_episodes)
        self.samples_per_epoch = samples_per_epoch

    @classmethod
    def from_minari(
        cls,
        dataset: str | minari.MinariDataset,
        context: int = 20,
        batch_size: int = 64,
        episodes: int | None = None,
        val_episodes: int | None = None,
        **options: Any,
    ) -> TrajectoryDataModule:
        """The episodes of a Minari data set, of any environment whose observations and actions are vectors.

        They are read into memory, float32. ``module_options`` has what a new module for them needs. Observations are a
        Box of one axis, or a Dict with ``observation`` (a goal environment), whose ``desired_goal`` is then part of the
        state.

        Example::

            data = TrajectoryDataModule.from_minari("mujoco/halfcheetah/expert-v0")
            module = DecisionTransformerModule(**data.module_options, width=128, layers=3, heads=4, context=20)

        Args:
            dataset: Id of a data set in Minari's local folder, or the data set.
            context, batch_size, episodes: As above.
            val_episodes: Held-out episodes, the last ones; a tenth of all, and one of few, for None.
            options: ``eval_batch_size``, ``seed``, ``workers``, ``samples_per_epoch``, as above.

        Raises:
            MissingInputError: There is no such data set here.
            InputError: A value is out of range, or the data set is damaged or has observations or actions of another
                kind.
        """
        # Minari takes a second to import, and Meta-World's demonstrations do not need it
        from eva_lightning.rl.minari_import import open_minari, read_minari

        trajectories = read_minari(open_minari(dataset))
        if val_episodes is None:
            n = len(trajectories)
            val_episodes = max(n // 10, 1) if n > 1 else 0
        return cls(trajectories, (), context, batch_size, episodes, val_episodes, **options)

    def _split(self, episodes: int | None, held_out: int) -> tuple[Ints, Ints]:
        train, val = [], []
        for number, task in enumerate(self.tasks):
            all_of_it = np.flatnonzero(self.store.task_of == number)
            n = len(all_of_it) - held_out
            if n < (1 if episodes is None else episodes):
                wanted = f"{episodes or 1} training and {held_out} held-out episodes"
                place = f"{self.folder} has" if isinstance(self.store, TrajectoryStore) else "there are"
                raise InputError(f"{place} {len(all_of_it)} episodes of {task}, too few for {wanted}")
            train.append(all_of_it[: n if episodes is None else episodes])
            val.append(all_of_it[n:])
        return np.concatenate(train), np.concatenate(val)

    @property
    def max_return(self) -> dict[str, float]:
        """Largest return of each task's training episodes: the paper's target return."""
        return {task: float(self._returns(number).max()) for number, task in enumerate(self.tasks)}

    @property
    def mean_return(self) -> dict[str, float]:
        """Mean return of each task's training episodes."""
        return {task: float(self._returns(number).mean()) for number, task in enumerate(self.tasks)}

    def _returns(self, number: int) -> npt.NDArray[np.float64]:
        returns: npt.NDArray[np.float64] = self.store.returns[self._train[self.store.task_of[self._train] == number]]
        return returns

    @property
    def statistics(self) -> dict[str, list[float]]:
        """``state_mean`` and ``state_std`` over the training episodes, as the module's arguments."""
        count, total, squares = 0, np.zeros(self.store.state_dim), np.zeros(self.store.state_dim)
        for episode in self._train:
            states = self.store.states(episode).astype(np.float64)
            count += len(states)
            total += states.sum(axis=0)
            squares += np.square(states).sum(axis=0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        return {"state_mean": mean.tolist(), "state_std": std.tolist()}

    @property
    def module_options(self) -> dict[str, Any]:
        """Arguments of a new :class:`DecisionTransformerModule` for these data.

        Sizes, bounds of actions, ``statistics``, scales (the largest return-to-go and reward) and, where there is one
        task, the largest return of the training episodes as the return that rollouts ask for.
        """
        low, high = self.store.bounds or (None, None)
        to_go, reward = self.store.largest
        return {
            "state_dim": self.store.state_dim,
            "action_dim": self.store.action_dim,
            **self.statistics,
            "action_low": low,
            "action_high": high,
            # 1 where all are 0
            "return_scale": to_go or 1.0,
            "reward_scale": reward or 1.0,
            "max_timesteps": int(self.store.lengths.max()),
            "target_return": self.max_return[self.tasks[0]] if len(self.tasks) == 1 else None,
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Random windows, in batches of `batch_size`."""
        dataset = WindowDataset(self.store, self._train, self.context, self.seed, self.target)
        samples = len(dataset) if self.samples_per_epoch is None else self.samples_per_epoch
        # an epoch of less than a batch would have none
        done = None if self.trainer is None else self._done
        keys = BatchKeys(max(samples, self.batch_size), self.batch_size, True, *self._place(), done)
        return self._loader(dataset, keys)

    def val_dataloader(self) -> Any:
        """The held-out episodes' windows in order, or no loader where none are held out."""
        if not len(self._val):
            return []
        dataset = WindowDataset(self.store, self._val, self.context, None, self.target)
        return self._loader(dataset, BatchKeys(len(dataset), self.eval_batch_size, False, *self._place()))

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _done(self) -> int:
        """Batches the trainer has had; restored with its checkpoint."""
        assert self.trainer is not None
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready)

    def _loader(self, dataset: WindowDataset, keys: BatchKeys) -> DataLoader[Batch]:
        return ResumableLoader(
            dataset,
            batch_size=None,
            sampler=keys,
            collate_fn=_as_fetched,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # an own generator: otherwise every pass over the loader would advance the global random state
            generator=torch.Generator().manual_seed(self.seed),
        )


def _stored(folder: Path, tasks: Sequence[str], target: str, *options: Any) -> TrajectoryStore:
    """The demonstrations of a folder; `options` are those of :meth:`TrajectoryStore.build`."""
    if not tasks:
        raise InputError("tasks must name at least one task, got none")
    if target == "expert":
        refuse_imported(folder, tasks)
    return TrajectoryStore.build(folder, [resolve_task(task) for task in tasks], *options)


def refuse_imported(folder: Path, tasks: Sequence[str]) -> None:
    """Refuse to train on the expert's actions where the demonstrations are others' and hold executed ones alone.

    Raises:
        MissingInputError: Demonstrations are missing.
        InputError: Some are others'.
    """
    index = read_index(folder)
    for task in map(resolve_task, tasks):
        source = index[task].source
        if source is not None:
            raise InputError(
                f"the demonstrations of {task} in {folder} were imported from {source}, which has executed actions and "
                "no expert's: use target executed"
            )


def _as_fetched(batch: Any) -> Batch:
    fetched: Batch = batch
    return fetched
