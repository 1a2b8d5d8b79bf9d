"""What runs that train with Lightning share: precision, training that can be resumed, EVA's part of the metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry

from eva_lightning.callback import EVAInitCallback
from eva_lightning.divergence import DivergenceCallback
from eva_lightning.errors import InputError, check_choice
from eva_lightning.side_effects import rng_state, set_rng_state
from eva_lightning.state import EVAState

_LOGGER = logging.getLogger(__name__)


class Divergence(DivergenceCallback):
    """Whether a run has diverged, also before it was interrupted: travels in checkpoints."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on from what the checkpoint says."""

    def state_dict(self) -> dict[str, Any]:
        return {"diverged": self.diverged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.diverged = state_dict["diverged"]
        if self.diverged is not None:
            _LOGGER.warning("the run to resume is lost: %s", self.diverged)

    def metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, str]:
        """``{"diverged": sentence}`` of a run that has, else nothing; after training."""
        if self.diverged is None:
            # the last steps, where training did not end with an epoch
            self.on_train_epoch_end(trainer, module)
        return {} if self.diverged is None else {"diverged": self.diverged}


def on_gpu(accelerator: str) -> bool:
    """Whether a CUDA device is wanted and there."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def trainer_precision(precision: str, accelerator: str) -> str:
    """The Trainer's precision: ``"auto"`` is bf16-mixed where there is a GPU that can, and fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if on_gpu(accelerator) and torch.cuda.is_bf16_supported() else "32-true"


def check_devices(devices: int, accelerator: str) -> None:
    """Make sure that a Trainer can have these devices: on a CPU it starts as many processes as it is told to, and they
    never end.

    Raises:
        InputError: There are fewer, or none of this kind.
    """
    _check_accelerator(accelerator)
    there = torch.cuda.device_count() if on_gpu(accelerator) else os.cpu_count() or 1
    if devices > there:
        kind = "GPUs" if on_gpu(accelerator) else "CPU cores"
        message = f"devices must be at most the {there} {kind} of this machine, got {devices}"
        raise InputError(message, setting="devices")


def _check_accelerator(accelerator: str) -> None:
    kinds = sorted(AcceleratorRegistry.available_accelerators())
    check_choice("accelerator", accelerator, ("auto", "gpu", *kinds))
    wanted = {"auto": ("cpu",), "gpu": ("cuda", "mps")}.get(accelerator, (accelerator,))
    if not any(AcceleratorRegistry[kind]["accelerator"].is_available() for kind in wanted if kind in kinds):
        raise InputError(f"accelerator {accelerator} is not on this machine: choose auto or cpu", setting="accelerator")


class RandomState(L.Callback):
    """Keep the global random generators, of each process its own, in checkpoints.

    A resumed run then draws the dropout masks that the uninterrupted one would have drawn. Lightning restores no
    generator. Data loaders have generators of their own, which depend on seed and epoch only.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """One state for each process; all of them write checkpoints together."""
        own = rng_state()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"states": [own]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, own)
        return {"states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them for ``on_train_start``."""
        self._restored = dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators, now that nothing draws from them any more but the training."""
        if self._restored is not None and len(self._restored["states"]) == trainer.world_size:
            set_rng_state(self._restored["states"][trainer.global_rank])
        self._restored = None


def fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: L.LightningDataModule,
    checkpoint: Path | None,
    progress: Callable[[], str],
) -> None:
    """Train, from `checkpoint` if there is one; `progress` says how far it is when it is interrupted.

    Interrupted in whatever way and resumed, a run ends with the weights it would have had.
    """
    # last, so that what other callbacks do at the start of training draws from the generators before they are set
    trainer.callbacks.append(RandomState())  # type: ignore[attr-defined]
    if checkpoint is not None:
        _LOGGER.info("resuming from %s", checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:
        # how Lightning ends on Ctrl-C
        _LOGGER.warning("interrupted after %s; rerun to resume", progress())
        raise


def eva_state(callbacks: Iterable[L.Callback]) -> EVAState | None:
    """What EVA started from, once it has; None for other methods."""
    return next((callback.state for callback in callbacks if isinstance(callback, EVAInitCallback)), None)


def eva_metrics(callbacks: Iterable[L.Callback]) -> dict[str, Any]:
    """The ranks that EVA chose, and what its streaming took; empty for other methods."""
    state = eva_state(callbacks)
    if state is None:
        return {}
    return {"init_seconds": state.seconds, "init_batches": state.n_batches, "ranks": dict(state.ranks)}
