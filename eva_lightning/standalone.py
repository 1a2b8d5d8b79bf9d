"""EVA in one call, for training loops of one's own: plain PyTorch, Fabric, transformers' Trainer."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import Dataset, IterableDataset

from eva_lightning.adapters.registry import materialise
from eva_lightning.callback import EVAInitCallback
from eva_lightning.done import done
from eva_lightning.errors import InputError, InputTypeError
from eva_lightning.initialiser import Initialiser
from eva_lightning.namespaces import is_set_up_by_fabric
from eva_lightning.output import is_first
from eva_lightning.state import EVAState
from eva_lightning.svd.distributed import world_size
from eva_lightning.training_batches import batches_of

_OF_THE_TRAINER = ("adapter_only_checkpoints", "log")


def initialize(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    rho: float = 2.0,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    state: EVAState | str | os.PathLike[str] | None = None,
    verbose: bool = True,
    **options: Any,
) -> EVAState:
    """Initialise LoRA adapters from data and redistribute their ranks, as :class:`EVAInitCallback` does, at once.

    LoRA layers that the model has are used; where it has none they are put in, and the rest is frozen but for the
    output head. Call it when the model is where it will train and before the optimizer is made, which needs the new
    parameters (``requires_grad``), and before the model is wrapped or sharded (``fabric.setup``,
    DistributedDataParallel, ``fully_shard``). transformers' Trainer makes its optimizer in ``train()``, so that any
    moment before will do. In a ``torch.distributed`` job every process gives its own batches and all get the A of the
    union. Modes, buffers, random states and the order of a loader stay as they were; on failure the model does, too.

    Example::

        state = eva_lightning.initialize(model, train_loader, rho=2)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    Args:
        model: Any module.
        batches: A DataLoader, or any iterable of minibatches, a generator too. They are moved to the model's device.
            Not needed with `state`.
        rho, r, alpha, target_modules, exclude: As of :class:`EVAInitCallback`.
        state: A state computed before, or the path of a saved one: the same ranks and A, and nothing is streamed.
        verbose: Say what is done (:mod:`eva_lightning.output`) and draw a progress bar.
        options: Every other argument of :class:`EVAInitCallback`: ``forward_fn``, ``mask_fn``, ``lora``, ``head``,
            ``adapt_frozen``, ``streaming`` or single options of it, ``metric``, ``init``, ``rescale_alpha``.

    Returns:
        The state: ranks, components, spectra. Its ``save`` writes what `state` takes.

    Raises:
        InputError: An argument is out of range or contradicts another, the adapters are initialised already, there is
            no minibatch, or see :class:`eva_lightning.initialiser.Initialiser`.
        InputTypeError: An argument has the wrong type; the model is wrapped or sharded already.
        FloatingPointError: Activations are NaN or infinite; names layer and minibatch.
    """
    _check_model(model)
    if not isinstance(verbose, bool):
        raise InputTypeError(f"verbose must be True or False, got {verbose!r}", setting="verbose")
    for name in _OF_THE_TRAINER:
        if name in options:
            raise InputTypeError(f"{name} is for EVAInitCallback and a Trainer: leave it out", setting=name)
    callback = EVAInitCallback(rho, r, alpha, target_modules, exclude, state=state, verbose=verbose, **options)
    where = _Alone(model, _checked(batches, callback.initialiser), verbose)
    return _initialise(callback.initialiser, where, model, verbose)


def _initialise(initialiser: Initialiser, where: _Alone, model: nn.Module, verbose: bool) -> EVAState:
    initialiser.take_up(model)
    initialiser.forget_reset(model)
    with initialiser.undone_on_failure(model):
        materialise(model)
        layers = initialiser.to_do(model)
        injected = layers is None
        if layers is None:
            layers = initialiser.inject(model)
        if not layers:
            raise InputError(
                f"the adapters of {type(model).__name__} are {done(model) or 'trained'} already: build the model anew "
                "to initialise it again"
            )
        return initialiser.initialise(where, model, layers, injected=injected, verbose=verbose)


@dataclass(frozen=True)
class _Alone:
    """A model that nobody holds yet, and minibatches that were given."""

    model: nn.Module
    source: Iterable[Any]
    verbose: bool

    @property
    def world_size(self) -> int:
        return world_size()

    @property
    def shows_progress(self) -> bool:
        return self.verbose and is_first()

    @property
    def refuses_unused_parameters(self) -> bool:
        return False

    def set_up(self) -> int | float:
        return math.inf  # however many there are

    def batches(self, limit: int) -> Iterator[Any]:
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        return batches_of(self.source, limit, lambda batch: move_data_to_device(batch, device))

    def forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext()  # an autocast around the call is there already

    def renew(self, replaced: bool) -> None:
        pass


class _Kept:
    """What a one-shot iterator gives, from the start each time: EVA may have to begin again."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._rest = iterator
        self._seen: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while True:
            if index == len(self._seen):
                try:
                    self._seen.append(next(self._rest))
                except StopIteration:
                    return
            yield self._seen[index]
            index += 1


def _checked(batches: Any, initialiser: Initialiser) -> Iterable[Any]:
    """`batches`, once they are found to be minibatches that can be gone through from the start."""
    if initialiser.given is not None:
        return ()
    if batches is None:
        raise InputError("give batches, a DataLoader or any iterable of minibatches, or the state of an earlier run")
    if isinstance(batches, (torch.Tensor, Mapping, str, bytes)):
        raise InputTypeError(
            f"batches must be a DataLoader or an iterable of minibatches, got one {type(batches).__name__}: put it "
            "into a list"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise InputTypeError(
            f"batches must be minibatches, got the samples of a {type(batches).__name__}: give DataLoader(dataset, "
            "batch_size=...)"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise InputTypeError(
            f"batches must be a DataLoader or an iterable of minibatches, got {type(batches).__name__}"
        )
    return _Kept(batches) if isinstance(batches, Iterator) else batches


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = [type(m).__name__ for m in model.modules() if _wraps(m)]
    if wrappers or any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        how = f"wrapped ({wrappers[0]})" if wrappers else "sharded"
        raise InputTypeError(
            f"the model is {how} already, which keeps the parameters that EVA replaces: call initialize before that"
        )


def _wraps(module: nn.Module) -> bool:
    # FSDP 1 and DeepSpeed are not imported for this: a module that is not loaded has no instances
    loaded = [
        getattr(sys.modules.get(name), cls, None)
        for name, cls in (("torch.distributed.fsdp", "FullyShardedDataParallel"), ("deepspeed", "DeepSpeedEngine"))
    ]
    kinds = (DataParallel, DistributedDataParallel, *filter(None, loaded))
    return isinstance(module, kinds) or is_set_up_by_fabric(module)
