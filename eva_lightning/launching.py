"""Results of a fit in child processes (ddp_spawn, ddp_fork, ddp_notebook), brought back to the parent's module.

Lightning's launcher loads the weights of the first child into the parent's module without asking whether they fit. The
adapters are made in the children, so the parent would keep its base weights and say nothing. No hook of a callback
runs in the parent; this is the one place where a method of Lightning's is replaced.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor

from eva_lightning.namespaces import lightning_classes


@runtime_checkable
class ComesHome(Protocol):
    """A callback that changes a module in the children of a fit."""

    def leave(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """In the first child, after the fit: what the parent needs, primitives and tensors only."""

    def come_home(self, pl_module: pl.LightningModule, luggage: Mapping[str, Any]) -> None:
        """In the parent, before the weights are loaded: take that up."""


def watch_launches() -> None:
    """Have launchers that start processes bring home what :class:`ComesHome` callbacks did there."""
    launchers: tuple[Any, ...] = lightning_classes("strategies.launchers", "_MultiProcessingLauncher")
    for launcher in launchers:
        if not hasattr(launcher.launch, _WATCHED):
            launcher.launch = _bringing_home(launcher.launch)


_WATCHED = "_eva_lightning_watched"


def _bringing_home(launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def launch_and_return(
        self: Any, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        if trainer is None or trainer.state.fn != "fit" or not _travellers(trainer):
            return launch(self, function, *args, trainer=trainer, **kwargs)
        with tempfile.TemporaryDirectory() as folder, _weights_wait(trainer.lightning_module) as weights:
            luggage = Path(folder) / "luggage.pt"
            result = launch(self, _InChild(function, trainer, luggage), *args, trainer=trainer, **kwargs)
            weights.load(_travellers(trainer), luggage)
        return result

    setattr(launch_and_return, _WATCHED, True)
    return launch_and_return


def _travellers(trainer: pl.Trainer) -> list[ComesHome]:
    return [c for c in trainer.callbacks if isinstance(c, ComesHome)]  # type: ignore[attr-defined]


class _InChild:
    """What runs in a child process: the fit, after which the first child writes down what the parent needs."""

    def __init__(self, function: Callable[..., Any], trainer: pl.Trainer, luggage: Path) -> None:
        self.function, self.trainer, self.luggage = function, trainer, luggage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.trainer.lightning_module
        vars(module).pop("load_state_dict", None)
        result = self.function(*args, **kwargs)
        if self.trainer.strategy.local_rank == 0:  # type: ignore[attr-defined]
            torch.save([callback.leave(module) for callback in _travellers(self.trainer)], self.luggage)
        return result


class _WaitingWeights:
    """Stands for the parent module's ``load_state_dict`` while children train: their weights have to wait."""

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.weights: dict[str, Tensor] | None = None

    def __call__(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        self.weights = dict(state_dict)

    def load(self, callbacks: list[ComesHome], luggage: Path) -> None:
        """Make the module's adapters those of the children, then load the weights as Lightning would."""
        vars(self.module).pop("load_state_dict", None)
        if self.weights is None:
            return
        for callback, own in zip(callbacks, torch.load(luggage, weights_only=True), strict=True):
            callback.come_home(self.module, {**own, "state_dict": self.weights})
        self.module.load_state_dict(self.weights, strict=False)


@contextmanager
def _weights_wait(module: pl.LightningModule) -> Iterator[_WaitingWeights]:
    weights = vars(module)["load_state_dict"] = _WaitingWeights(module)
    try:
        yield weights
    finally:
        vars(module).pop("load_state_dict", None)
