"""What a long training run has reached: a row of ``metrics.csv`` per validation, steps per second, utilisation.

Lightning's own parts do not do: its CSVLogger starts a new file when a run is resumed; its ThroughputMonitor waits for
the device at every step and forgets the time before a resumption; its table of peak operations has an H100 at 1,979
Tflop/s, which is with sparsity, where a dense product reaches half of it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import torch

from eva_lightning.files import replacing
from eva_lightning.reading import reading

logger = logging.getLogger(__name__)

#: Peak dense bf16 operations per second, from the vendor's data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


class StepHistory(L.Callback):
    """Collect losses and speed at each validation, and keep ``metrics.csv`` up to date.

    Rows travel in checkpoints and in the file, so that a resumed run continues its history. Time spent in validation
    and rollouts does not count as training.

    Args:
        file: CSV file to write.
        flops: Floating-point operations of one step, for the model FLOP utilisation.

    Attributes:
        rows: One mapping per validation: ``step``, ``train_loss`` (mean since the row before), ``lr``,
            ``updates_per_second``, ``model_flop_utilisation``, ``seconds`` (of training), and what was logged under
            ``val_...`` and ``rollout...``.
    """

    def __init__(self, file: str | Path, flops: float) -> None:
        self.file = Path(file)
        self.flops = flops
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self.train_loss = float("nan")
        self.peak = float("nan")
        self.device = ""
        self._losses: list[torch.Tensor] = []
        self._since: float | None = None
        self._timed_steps = 0
        self._row_start = (0, 0.0)

    @property
    def updates_per_second(self) -> float:
        """Over the whole training, validation left out."""
        return self._timed_steps / self.seconds if self.seconds else float("nan")

    @property
    def utilisation(self) -> float:
        """Floating-point operations of the steps as a share of the device's peak."""
        return self.updates_per_second * self.flops / self.peak

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look up or measure what the device can do at most."""
        self.device, self.peak = peak_flops(trainer.strategy.root_device)
        self.peak *= trainer.world_size
        self.flops *= trainer.world_size

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; add the rows of an interrupted run that its checkpoint lacks."""
        known = {row["step"] for row in self.rows}
        self.rows += [row for row in self._read() if row["step"] <= trainer.global_step and row["step"] not in known]
        self.rows.sort(key=lambda row: row["step"])
        self._since = time.perf_counter()
        self._row_start = (self._timed_steps, self.seconds)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss, on its device: reading it here would wait for the device."""
        # torchmetrics' MeanMetric takes 0.3 ms a step, more than 5% of a small network's step on a GPU
        self._losses.append(outputs["loss"].detach())
        self._timed_steps += 1

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append a row and start the clock again."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._append(trainer)
        self._since = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append what came after the last validation."""
        self._pause()
        if self._losses:
            self._append(trainer)

    def _pause(self) -> None:
        if self._since is not None:
            if self._losses:
                float(self._losses[-1])  # the device has done what was asked
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def _append(self, trainer: L.Trainer) -> None:
        if self._losses:
            self.train_loss = float(torch.stack(self._losses).float().mean())
            self._losses = []
        steps, seconds = self._timed_steps - self._row_start[0], self.seconds - self._row_start[1]
        self._row_start = (self._timed_steps, self.seconds)
        rate = steps / seconds if seconds else float("nan")
        row: dict[str, float] = {
            "step": trainer.global_step,
            "train_loss": self.train_loss,
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "updates_per_second": rate,
            "model_flop_utilisation": rate * self.flops / self.peak,
            "seconds": self.seconds,
        }
        logged = sorted(trainer.callback_metrics.items())
        row.update({key: float(value) for key, value in logged if key.startswith(("val_", "rollout"))})
        self.rows.append(row)
        shown = ("train_loss", "val_loss", "lr", "updates_per_second", "model_flop_utilisation")
        text = ", ".join(f"{key.replace('_', ' ')} {row[key]:.4g}" for key in shown if key in row)
        logger.info("step %d of %s: %s", row["step"], trainer.max_steps, text)
        if trainer.is_global_zero:
            self._write()

    def _read(self) -> list[dict[str, float]]:
        if not self.file.is_file():
            return []
        with reading(self.file, "delete it"):
            rows = pd.read_csv(self.file).astype(float).to_dict("records")
            if any("step" not in row for row in rows):
                raise ValueError("it has no column step")
            rows = [{**row, "step": int(row["step"])} for row in rows]
        return [{key: value for key, value in row.items() if not pd.isna(value)} for row in rows]

    def _write(self) -> None:
        with replacing(self.file) as temporary:
            pd.DataFrame(self.rows).to_csv(temporary, index=False)

    def state_dict(self) -> dict[str, Any]:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return {"rows": self.rows, "seconds": self.seconds + running, "timed_steps": self._timed_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]
        self.seconds, self._timed_steps = state_dict["seconds"], state_dict["timed_steps"]


_PEAK_SECONDS = 0.5


def peak_flops(device: torch.device) -> tuple[str, float]:
    """Name of `device` and its floating-point operations per second at best.

    Data sheet figures for bf16 where they are known; else what a large fp32 matrix product reaches.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for part, peak in PEAKS.items():
        if part in name:
            return name, peak
    n = 1024
    a = torch.ones(n, n, device=device)
    best, until = float("inf"), time.perf_counter() + _PEAK_SECONDS
    # the best of many: the first ones warm up, and other processes disturb some
    while time.perf_counter() < until:
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return name + threads, 2 * n**3 / best
