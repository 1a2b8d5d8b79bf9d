"""Bring a Trainer up to date when parameters of its module were replaced after it had set up its own state."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl
import lightning.pytorch.callbacks as pl_callbacks
from lightning.pytorch.utilities.model_helpers import is_overridden

# WeightAveraging came with Lightning 2.5.3
_AVERAGING_NAMES = ("StochasticWeightAveraging", "WeightAveraging")
_AVERAGING = tuple(getattr(pl_callbacks, n) for n in _AVERAGING_NAMES if hasattr(pl_callbacks, n))


def after_configure_model(pl_module: pl.LightningModule, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` once, after the module's ``setup`` and ``configure_model``; returns a function that calls it off."""
    original = pl_module.configure_model

    def stop() -> None:
        vars(pl_module).pop("configure_model", None)

    def configure_model() -> None:
        stop()
        original()
        then()

    vars(pl_module)["configure_model"] = configure_model
    return stop


def changes_modules_after(callback: pl.Callback, trainer: pl.Trainer) -> bool:
    """Whether a callback after `callback` may freeze or change layers in its ``setup``, as BackboneFinetuning does."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    later = callbacks[callbacks.index(callback) + 1 :] if callback in callbacks else []
    return any(
        isinstance(c, pl_callbacks.BaseFinetuning)
        or (is_overridden("setup", c, pl.Callback) and not type(c).__module__.startswith("lightning."))
        for c in later
    )


def rebuild_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Place and wrap the module as it is now and give it optimizers, through the strategy's public methods.

    ``configure_optimizers`` runs once more.
    """
    trainer.strategy.connect(pl_module)
    trainer.strategy.setup(trainer)


def refresh_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let callbacks that keep an average of the weights copy the module as it is now."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, _AVERAGING) and trainer.state.fn == "fit":
            callback.setup(trainer, pl_module, "fit")
