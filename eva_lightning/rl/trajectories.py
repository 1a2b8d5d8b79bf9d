"""Windows of demonstrations as a LightningDataModule: memory-mapped steps, one vectorised read per batch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from eva_lightning.errors import InputError, unknown
from eva_lightning.rl.demonstrations import TaskDemonstrations, load_task, read_index
from eva_lightning.rl.environments import ACTION_DIM, STATE_DIM
from eva_lightning.rl.tasks import resolve_task

Ints = npt.NDArray[np.int64]
Batch = dict[str, Tensor]

DTYPES = ("float32", "float16")
TARGETS = ("executed", "expert")

#: A state is what is seen now, the same of the step before, and the goal.
_FRAME = 18
_FORMAT = 1
_ARRAYS = ("states", "actions", "scalars", "episodes")


class TrajectoryStore:
    """The steps of several tasks' demonstrations, one after the other, in memory-mapped files.

    Read as little or as often as wanted: the operating system keeps what is used in memory, once for all processes.

    Args:
        path: Folder made by :meth:`build`.

    Attributes:
        tasks: Names of the tasks.
        starts, lengths: ``(n_episodes,)`` first row and number of steps of each episode.
        task_of: ``(n_episodes,)`` index into `tasks`.
        returns: ``(n_episodes,)`` float64, undiscounted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        about = json.loads((self.path / "store.json").read_text(encoding="utf-8"))
        self.tasks: tuple[str, ...] = tuple(about["tasks"])
        self.drop_previous_frame: bool = about["drop_previous_frame"]
        self._open()
        self.starts, self.lengths, self.task_of = np.load(self.path / "episodes.npy")
        # the return-to-go of an episode's first step
        self.returns = self._scalars[self.starts, 1].astype(np.float64)

    def _open(self) -> None:
        self._states, self._actions, self._scalars = (
            np.load(self.path / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS[:3]
        )

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be sent to loader processes with its content
        return {name: value for name, value in vars(self).items() if name not in ("_states", "_actions", "_scalars")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.starts)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        tasks: Sequence[str],
        cache_dir: str | Path | None = None,
        dtype: str = "float32",
        drop_previous_frame: bool = False,
    ) -> TrajectoryStore:
        """The store of `tasks` of a folder of demonstrations; made at the first call and when the files change.

        Args:
            folder: Folder of demonstrations.
            tasks: Names of tasks.
            cache_dir: Where stores are kept; ``folder/cache`` for None.
            dtype: ``"float16"`` halves states and actions (positions to half a millimetre); rewards stay float32.
            drop_previous_frame: Leave out dimensions 18 to 35 of the state, which repeat dimensions 0 to 17 of the
                step before, and put them back when reading: the same bits from 54% of the size.

        Raises:
            MissingInputError, InputError: See :func:`~eva_lightning.rl.demonstrations.load_task`; or a name is unknown.
        """
        if dtype not in DTYPES:
            raise InputError(unknown("dtype", dtype, DTYPES))
        tasks = [resolve_task(task) for task in tasks]
        index = read_index(folder)
        about = {
            "format": _FORMAT,
            "tasks": tasks,
            "checksums": [index[task].sha256 for task in tasks],
            "dtype": dtype,
            "drop_previous_frame": drop_previous_frame,
        }
        text = json.dumps(about, indent=2) + "\n"
        cache = Path(folder) / "cache" if cache_dir is None else Path(cache_dir)
        path = cache / f"trajectories-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if not (path / "store.json").is_file():
            temporary = cache / f"{path.name}.{os.getpid()}.part"
            try:
                _write(temporary, [(task, folder) for task in tasks], np.dtype(dtype), drop_previous_frame)
                (temporary / "store.json").write_text(text, encoding="utf-8")
                if not path.exists():  # another process may have been faster
                    temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return cls(path)

    def states(self, episode: int) -> npt.NDArray[np.floating]:
        """States ``(T, 39)`` of an episode: a view of the file, unless the previous frame was left out."""
        return self._read_states(np.arange(self.starts[episode], self.starts[episode] + self.lengths[episode]))

    def window(self, episode: int, first: int, steps: int) -> dict[str, npt.NDArray[Any]]:
        """Steps of an episode as views of the files, nothing copied: ``actions`` and ``target_actions`` ``(n, 4)``,
        ``rewards`` and ``returns_to_go`` ``(n,)`` and, unless the previous frame was left out, ``states`` ``(n, 39)``.

        Args:
            episode: Number of the episode.
            first: First step.
            steps: Number of steps; fewer come at the end of the episode.
        """
        begin = int(self.starts[episode]) + first
        rows = slice(begin, min(begin + steps, int(self.starts[episode] + self.lengths[episode])))
        views = {
            "actions": self._actions[rows, :ACTION_DIM],
            "target_actions": self._actions[rows, ACTION_DIM:],
            "rewards": self._scalars[rows, 0],
            "returns_to_go": self._scalars[rows, 1],
        }
        return views if self.drop_previous_frame else {"states": self._states[rows], **views}

    def gather(self, episodes: Ints, first: Ints, lengths: Ints, context: int, target: str = "executed") -> Batch:
        """Windows as one batch, float32, left-aligned: padding, all zeros, comes after the real steps.

        Args:
            episodes: ``(B,)`` episode of each window.
            first: ``(B,)`` first step of each window within its episode.
            lengths: ``(B,)`` real steps of each window.
            context: Steps of a window, K.
            target: ``"expert"`` adds the expert's clean actions.

        Returns:
            ``states`` ``(B, K, 39)``, ``actions`` ``(B, K, 4)``, ``rewards``, ``returns_to_go`` ``(B, K)`` float32,
            ``timesteps`` ``(B, K)`` int64, ``mask`` ``(B, K)`` bool and, for ``"expert"``, ``target_actions``.
        """
        steps = np.arange(context)
        mask = steps < lengths[:, None]  # (B, K)
        rows = (self.starts[episodes] + first)[:, None] + steps
        states = self._read_states(rows)
        actions = self._actions.take(rows, axis=0, mode="clip")
        scalars = self._scalars.take(rows, axis=0, mode="clip")
        timesteps = first[:, None] + steps
        if not mask.all():
            for array in (states, actions, scalars, timesteps):
                array[~mask] = 0
        batch = {
            "states": states,
            "actions": actions[..., :ACTION_DIM],
            "rewards": scalars[..., 0],
            "returns_to_go": scalars[..., 1],
            "timesteps": timesteps,
            "mask": mask,
        }
        if target == "expert":
            batch["target_actions"] = actions[..., ACTION_DIM:]
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def _read_states(self, rows: Ints) -> npt.NDArray[np.floating]:
        if not self.drop_previous_frame:
            states: npt.NDArray[np.floating] = self._states.take(rows, axis=0, mode="clip")
            return states
        stored = self._states.take(rows, axis=0, mode="clip")
        before = self._states[..., :_FRAME].take(rows - 1, axis=0, mode="clip")
        return np.concatenate((stored[..., :_FRAME], before, stored[..., _FRAME:]), axis=-1)


def _write(path: Path, sources: list[tuple[str, str | Path]], dtype: np.dtype[Any], drop: bool) -> None:
    """Write the arrays of a store, task by task, so that memory holds one task at a time."""
    path.mkdir(parents=True)
    # without its previous frame, a state needs the row before it: one more row ahead of each episode
    lead = int(drop)
    width = STATE_DIM - _FRAME if drop else STATE_DIM
    index = {task: read_index(folder)[task] for task, folder in sources}
    n_rows = sum(entry.episodes * (entry.horizon + lead) for entry in index.values())
    shapes = {"states": (n_rows, width), "actions": (n_rows, 2 * ACTION_DIM), "scalars": (n_rows, 2)}
    kinds = {"states": dtype, "actions": dtype, "scalars": np.dtype(np.float32)}
    files = {
        name: np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=kinds[name], shape=shape)
        for name, shape in shapes.items()
    }
    episodes, row = [], 0
    for number, (task, folder) in enumerate(sources):
        data = load_task(folder, task)
        n, t = len(data), data.horizon
        rows = slice(row, row + n * (t + lead))
        to_go = data.rewards[:, ::-1].cumsum(axis=1, dtype=np.float64)[:, ::-1]
        values = {
            "states": _frames(data) if drop else data.observations[:, :t],
            "actions": np.concatenate((data.actions, data.expert_actions), axis=-1),
            "scalars": np.stack((data.rewards, to_go), axis=-1),
        }
        for name, array in values.items():
            padded = np.pad(array, ((0, 0), (lead, 0), (0, 0))) if array.shape[1] == t and lead else array
            files[name][rows] = padded.reshape(-1, array.shape[-1])
        starts = row + lead + (t + lead) * np.arange(n)
        episodes.append(np.stack((starts, np.full(n, t), np.full(n, number))))
        row = rows.stop
    for file in files.values():
        file.flush()
    np.save(path / "episodes.npy", np.concatenate(episodes, axis=1).astype(np.int64))


def _frames(data: TaskDemonstrations) -> npt.NDArray[np.float32]:
    """``(N, T + 1, 21)``: current frame and goal of each state, after a row with the first state's previous frame."""
    states = data.observations[:, : data.horizon]
    if not np.array_equal(states[:, 1:, _FRAME : 2 * _FRAME], states[:, :-1, :_FRAME]):
        raise InputError(f"{data.task}: states do not repeat the frame before, so it cannot be left out")
    kept = np.concatenate((states[..., :_FRAME], states[..., 2 * _FRAME :]), axis=-1)
    first = np.pad(states[:, :1, _FRAME : 2 * _FRAME], ((0, 0), (0, 0), (0, kept.shape[-1] - _FRAME)))
    return np.concatenate((first, kept), axis=1)


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
        self, store: TrajectoryStore, episodes: Ints, context: int, seed: int | None, target: str = "executed"
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
    """Keys of an epoch's batches, in order; a resumed epoch goes on where it stopped.

    Args:
        n_samples: Samples of an epoch.
        batch_size: Samples per batch; the last may have fewer unless `drop_last`.
        drop_last: Leave out a last, smaller batch.
        rank, world_size: This process takes every `world_size`-th batch.
        done: Asked at the start of an epoch: how many batches this process has had, over all epochs. It goes on from
            there; without, it gives the whole epoch that was set.
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
    """Tells Lightning that it can go on in the middle of an epoch: its keys know where (:class:`BatchKeys`)."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer's progress says it all."""
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
        folder: Folder of demonstrations.
        tasks: Names of tasks.
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
        folder: str | Path,
        tasks: Sequence[str],
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
        for name, value, least in (
            ("context", context, 1),
            ("batch_size", batch_size, 1),
            ("episodes", episodes, 1),
            ("val_episodes", val_episodes, 0),
            ("eval_batch_size", eval_batch_size, 1),
            ("workers", workers, 0),
            ("samples_per_epoch", samples_per_epoch, batch_size),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if target not in TARGETS:
            raise InputError(unknown("target", target, TARGETS))
        if not tasks:
            raise InputError("tasks must name at least one task, got none")
        self.folder = Path(folder)
        self.tasks = tuple(resolve_task(task) for task in tasks)
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.workers = workers
        self.target = target
        self.store = TrajectoryStore.build(self.folder, self.tasks, cache_dir, dtype, drop_previous_frame)
        self._train, self._val = self._split(episodes, val_episodes)
        self.samples_per_epoch = samples_per_epoch

    def _split(self, episodes: int | None, held_out: int) -> tuple[Ints, Ints]:
        train, val = [], []
        for number, task in enumerate(self.tasks):
            all_of_it = np.flatnonzero(self.store.task_of == number)
            n = len(all_of_it) - held_out
            if n < (1 if episodes is None else episodes):
                wanted = f"{episodes or 1} training and {held_out} held-out episodes"
                raise InputError(f"{self.folder} has {len(all_of_it)} episodes of {task}, too few for {wanted}")
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
        count, total, squares = 0, np.zeros(STATE_DIM), np.zeros(STATE_DIM)
        for episode in self._train:
            states = self.store.states(episode).astype(np.float64)
            count += len(states)
            total += states.sum(axis=0)
            squares += np.square(states).sum(axis=0)
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
        return {"state_mean": mean.tolist(), "state_std": std.tolist()}

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


def _as_fetched(batch: Any) -> Batch:
    fetched: Batch = batch
    return fetched
