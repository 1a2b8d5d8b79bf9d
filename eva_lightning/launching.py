"""Results of a fit in child processes (ddp_spawn, ddp_fork, ddp_notebook), brought back to the parent's module.

Lightning's launcher loads the weights of the first child into the parent's module without asking whether they fit. The
adapters are made in the children, so the parent would keep its base weights and say nothing. No hook of a callback
runs in the parent; this is the one place where a method of Lightning's is replaced.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from eva_lightning.checkpoint import KEY, fit_to_checkpoint


@runtime_checkable
class ComesHome(Protocol):
    """A callback that changes a module in the children of a fit."""

    def leave(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """In the first child, after the fit: what the parent needs, primitives and tensors only."""

    def come_home(self, pl_module: pl.LightningModule, luggage: Mapping[str, Any]) -> dict[str, Any]:
        """In the parent: take that up; returns the description of the adapters for :func:`fit_to_checkpoint`."""


def watch_launches() -> None:
    """Have launchers that start processes bring home what :class:`ComesHome` callbacks did there."""
    if not hasattr(_MultiProcessingLauncher.launch, "__wrapped__"):
        _MultiProcessingLauncher.launch = _bringing_home(_MultiProcessingLauncher.launch)  # type: ignore[method-assign]


def _bringing_home(launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def launch_and_return(
        self: Any, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        callback = None if trainer is None or trainer.state.fn != "fit" else _traveller(trainer)
        if trainer is None or callback is None:
            return launch(self, function, *args, trainer=trainer, **kwargs)
        with tempfile.TemporaryDirectory() as folder:
            luggage = Path(folder) / "luggage.pt"
            module = trainer.lightning_module
            weights = _KeptWeights(module)
            vars(module)["load_state_dict"] = weights
            try:
                result = launch(self, _InChild(function, trainer, luggage), *args, trainer=trainer, **kwargs)
            finally:
                vars(module).pop("load_state_dict", None)
            weights.load(callback, luggage)
        return result

    return launch_and_return


def _traveller(trainer: pl.Trainer) -> ComesHome | None:
    return next((c for c in trainer.callbacks if isinstance(c, ComesHome)), None)  # type: ignore[attr-defined]


class _InChild:
    """What runs in a child process: the fit, after which the first child writes down what the parent needs."""

    def __init__(self, function: Callable[..., Any], trainer: pl.Trainer, luggage: Path) -> None:
        self.function, self.trainer, self.luggage = function, trainer, luggage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self.trainer.lightning_module).pop("load_state_dict", None)
        result = self.function(*args, **kwargs)
        callback = _traveller(self.trainer)
        if callback is not None and self.trainer.strategy.local_rank == 0:  # type: ignore[attr-defined]
            torch.save(callback.leave(self.trainer.lightning_module), self.luggage)
        return result


class _KeptWeights:
    """Stands for the parent module's ``load_state_dict`` while children train: their weights have to wait."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module, self.process = module, os.getpid()
        self.weights: dict[str, Tensor] | None = None

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if os.getpid() != self.process:
            return type(self.module).load_state_dict(self.module, state_dict, strict=strict, assign=assign)
        self.weights = dict(state_dict)
        return None

    def load(self, callback: ComesHome, luggage: Path) -> None:
        """Make the module's adapters those of the children, then load the weights as Lightning would."""
        if self.weights is None:
            return
        checkpoint: dict[str, Any] = {"state_dict": self.weights}
        if luggage.exists():
            checkpoint[KEY] = callback.come_home(self.module, torch.load(luggage, weights_only=True))
            fit_to_checkpoint(self.module, checkpoint)
        self.module.load_state_dict(checkpoint["state_dict"], strict=False)
