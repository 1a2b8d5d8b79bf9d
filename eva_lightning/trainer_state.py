"""Bring a Trainer up to date when parameters of its module were replaced after it had set up its own state."""

from __future__ import annotations

from collections.abc import Callable

import lightning.pytorch as pl

from eva_lightning.namespaces import lightning_classes

# WeightAveraging came with Lightning 2.5.3
_AVERAGING = ("StochasticWeightAveraging", "WeightAveraging")


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


def rebuild_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Place and wrap the module as it is now and give it optimizers, through the strategy's public methods.

    ``configure_optimizers`` runs once more.
    """
    trainer.strategy.connect(pl_module)
    trainer.strategy.setup(trainer)


def refresh_averages(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let callbacks that keep an average of the weights copy the module as it is now."""
    averaging = lightning_classes("callbacks", *_AVERAGING)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, averaging) and trainer.state.fn == "fit":
            callback.setup(trainer, pl_module, "fit")
