"""What neither the module nor EVA's callback logs: learning rate, time per epoch, the result by its settings."""

from __future__ import annotations

import time

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger


class RunLogging(L.Callback):
    """Complete what loggers get; without loggers it does nothing.

    - at the start: number of trained parameters;
    - after every epoch: ``lr`` (the highest of all parameter groups, after the last step) and ``epoch_seconds``;
    - after testing: ``hp/test_accuracy`` and ``hp/test_loss`` in TensorBoard's table of hyper-parameters.

    Args:
        epochs: Log what is logged after every epoch; of no use where steps are counted.
    """

    def __init__(self, epochs: bool = True) -> None:
        self._epochs = epochs
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what is known before the first step."""
        values = {"trainable_parameters": float(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log rate and time in the row of the epoch's means."""
        if trainer.loggers and self._epochs:
            pl_module.log("lr", max(group["lr"] for group in trainer.optimizers[0].param_groups))
            pl_module.log("epoch_seconds", time.perf_counter() - self._started)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the result beside the hyper-parameters."""
        tested = {f"hp/{k}": float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test_")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and tested:
                logger.log_hyperparams(dict(logger.hparams), tested)
