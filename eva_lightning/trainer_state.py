"""Bring a Trainer up to date when parameters of its module were replaced after it had set up its own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch.nn.parallel import DistributedDataParallel

from eva_lightning.namespaces import NAMES, is_overridden, lightning_classes

# WeightAveraging came with Lightning 2.6
_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")


def once_built(pl_module: pl.LightningModule, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` once, after the module's ``setup`` and ``configure_model``; returns a function that calls it off.

    WeightAveraging calls ``configure_model`` of its own accord, and before ``setup``: that does not count.
    """
    setup_hook, model_hook = pl_module.setup, pl_module.configure_model
    kept = {name: vars(pl_module).get(name) for name in ("setup", "configure_model")}
    builds_model = is_overridden("configure_model", pl_module)
    is_set_up = False

    def stop() -> None:
        for name, before in kept.items():
            vars(pl_module).pop(name, None)
            if before is not None:
                vars(pl_module)[name] = before

    def setup(stage: str) -> None:
        nonlocal is_set_up
        setup_hook(stage)
        is_set_up = True
        if not builds_model:
            stop()
            then()

    def configure_model() -> None:
        model_hook()
        if is_set_up:
            stop()
            then()

    vars(pl_module)["setup"] = setup
    if builds_model:
        vars(pl_module)["configure_model"] = configure_model
    return stop


def changes_modules_after(callback: pl.Callback, trainer: pl.Trainer) -> bool:
    """Whether a callback after `callback` may freeze or change layers in its ``setup``, as BackboneFinetuning does."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    later = callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else []
    finetuning = lightning_classes("callbacks", "BaseFinetuning")
    does_nothing = [copy.setup for copy in lightning_classes("callbacks.callback", "Callback")]
    return any(
        isinstance(c, finetuning) or (type(c).setup not in does_nothing and _package(type(c)) is None) for c in later
    )


def _package(cls: type) -> str | None:
    """The copy of Lightning that defines `cls` itself, if one does."""
    return next((copy for copy in NAMES if cls.__module__.startswith(f"{copy}.")), None)


def rebuild_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Place and wrap the module as it is now and give it optimizers, through the strategy's public methods.

    ``configure_optimizers`` runs once more.
    """
    trainer.strategy.connect(pl_module)
    trainer.strategy.setup(trainer)


def refresh_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let callbacks that keep an average of the weights copy the module as it is now."""
    averaging = lightning_classes("callbacks", *_AVERAGING)
    callbacks: list[Any] = [c for c in trainer.callbacks if isinstance(c, averaging)]  # type: ignore[attr-defined]
    for callback in callbacks:
        # StochasticWeightAveraging copies the module to test and predict too, and loads its average then
        callback.setup(trainer, pl_module, trainer.state.fn)


def refuses_unused_parameters(trainer: pl.Trainer) -> bool:
    """Whether training fails on a parameter that gets no gradient (DDP, unless told to look for those)."""
    model = trainer.strategy.model
    return isinstance(model, DistributedDataParallel) and not (model.find_unused_parameters or model.static_graph)
