"""The first training minibatches of a Trainer, without disturbing the training that follows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from eva_lightning.errors import InputError
from eva_lightning.namespaces import is_overridden, is_set_up_by_fabric
from eva_lightning.side_effects import isolated_rng, restored_sources


def set_up_loader(trainer: pl.Trainer) -> int | float:
    """Have the Trainer set its training data up now instead of a moment later; returns the batches per epoch.

    Raises:
        InputError: the loader is empty, or a one-shot iterator whose batches would be lost to training.
    """
    trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader
    for part in _parts(loader):
        _refuse_one_shot(part)
    n = trainer.num_training_batches
    if n == 0:
        raise InputError("the training data loader is empty (0 batches); EVA needs at least one batch")
    return n


def training_batches(trainer: pl.Trainer, limit: int) -> Iterator[Any]:
    """The first ``limit`` training minibatches on the training device, as the training loop would deliver them.

    Works on copies of the loaders; samplers, data sets and random generators are as before when the iterator closes.
    """
    loaders = trainer.train_dataloader
    copies = _map(loaders, _detached)
    source = copies if _is_single(copies) else (b for b, _, _ in _combined(copies))
    with isolated_rng(), restored_sources(list(_parts(loaders))):
        iterator = iter(source)
        try:
            for index, batch in enumerate(iterator):
                yield delivered(trainer, batch)
                if index + 1 >= limit:
                    break
        finally:
            # worker processes end with the iterator that owns them
            del iterator


def batches_of(source: Iterable[Any], limit: int, deliver: Callable[[Any], Any]) -> Iterator[Any]:
    """The first ``limit`` minibatches of other data, each as ``deliver`` gives it; generators are as before afterwards.

    Raises:
        InputError: there is none.
    """
    with isolated_rng(), restored_sources(source):
        empty = True
        for batch in itertools.islice(_detached(source), limit):
            empty = False
            yield deliver(batch)
    if empty:
        raise InputError(f"the data given ({type(source).__name__}) hold no minibatch, and one at least is needed")


def training_samples(trainer: pl.Trainer) -> int:
    """The size of the whole training set: of several loaders, all of theirs together.

    Raises:
        InputError: a loader's data set has no length.
    """
    total = 0
    for part in _parts(trainer.train_dataloader):
        data = getattr(part, "dataset", part)
        try:
            total += len(data)
        except TypeError:
            raise InputError(
                f"the size of the training set is needed, but {type(data).__name__} has no length; give it a __len__"
            ) from None
    return total


def _combined(loaders: Any) -> Iterator[Any]:
    combined = CombinedLoader(loaders, "max_size_cycle")
    yield from combined


def delivered(trainer: pl.Trainer, batch: Any) -> Any:
    """A minibatch on the training device, as the training loop would have it."""
    module = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    data = getattr(trainer, "datamodule", None)
    owner = data if data is not None and is_overridden("on_before_batch_transfer", data) else module
    batch = owner.on_before_batch_transfer(batch, 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _detached(loader: Any) -> Any:
    if not isinstance(loader, DataLoader) and not is_set_up_by_fabric(loader):
        return loader
    duplicate = copy.copy(loader)  # with Fabric's count of epochs, which orders what a distributed sampler gives
    for name, inner in vars(loader).items():
        if isinstance(inner, DataLoader):
            object.__setattr__(duplicate, name, _detached(inner))
    # persistent workers keep their iterator on the loader: the copy must start its own
    object.__setattr__(duplicate, "_iterator", None)
    return duplicate


def _refuse_one_shot(loader: Any) -> None:
    dataset = getattr(loader, "dataset", None)
    one_shot = isinstance(loader, Iterator) or isinstance(dataset, Iterator)
    source = dataset if isinstance(dataset, IterableDataset) else loader
    if not one_shot and not isinstance(source, (DataLoader, list, tuple, torch.Tensor)):
        with isolated_rng(), restored_sources(source):
            first = iter(source)
            one_shot = first is iter(source)
    if one_shot:
        what = loader if isinstance(loader, Iterator) else dataset
        raise InputError(
            f"the training data is a one-shot iterator ({type(what or loader).__name__}): batches that EVA reads would "
            "be lost to training; pass a loader that can be iterated again, or EVAInitCallback(state=...) with a "
            "precomputed state"
        )


def _is_single(loaders: Any) -> bool:
    return not isinstance(loaders, (Mapping, list, tuple)) or (
        isinstance(loaders, (list, tuple)) and not any(isinstance(x, DataLoader) for x in loaders)
    )


def _parts(loaders: Any) -> Iterator[Any]:
    if _is_single(loaders):
        yield loaders
    else:
        for part in loaders.values() if isinstance(loaders, Mapping) else loaders:
            yield from _parts(part)


def _map(loaders: Any, function: Any) -> Any:
    if _is_single(loaders):
        return function(loaders)
    if isinstance(loaders, Mapping):
        return {k: _map(v, function) for k, v in loaders.items()}
    return type(loaders)(_map(v, function) for v in loaders)
