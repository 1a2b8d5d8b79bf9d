"""One row of metrics per epoch, in a CSV file and in the checkpoint."""

from __future__ import annotations

import csv
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L

from eva_lightning.files import replacing

logger = logging.getLogger(__name__)

#: Columns of a row; ``val_…`` stay empty where nothing is validated. Accuracies in [0, 1], times in
#: seconds; ``lr`` is the learning rate after the last step of the epoch.
COLUMNS = ("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds")


class EpochHistory(L.Callback):
    """Collect the epoch means that a module logs, and keep ``metrics.csv`` up to date.

    The rows travel in checkpoints, so a resumed run continues its history, whatever an interrupted epoch wrote.
    Lightning's ``CSVLogger`` cannot do that: it deletes the file that it finds when a run is resumed.

    Args:
        file: CSV file to write after every epoch; None for none.

    Attributes:
        rows: One mapping per finished epoch, keys from ``COLUMNS``, epochs counted from 1.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        self.file = None if file is None else Path(file)
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append a row."""
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        row.update({key: float(value) for key, value in trainer.callback_metrics.items() if key in COLUMNS})
        row["lr"] = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        row["seconds"] = time.perf_counter() - self._started
        self.rows.append(row)
        logger.info(
            "epoch %d/%s: %s",
            row["epoch"],
            trainer.max_epochs,
            ", ".join(f"{key} {value:.4g}" for key, value in row.items() if key != "epoch"),
        )
        if self.file is not None and trainer.is_global_zero:
            self._write(self.file)

    def _write(self, file: Path) -> None:
        with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of the checkpoint."""
        self.rows = [dict(row) for row in state_dict["rows"]]
