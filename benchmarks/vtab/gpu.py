"""The paper's largest setting on a GPU: DINOv2-g/14, LoRA of rank 16, batch 64, bfloat16.

Images per second and peak memory of training, and the time of EVA's initialisation ÷ that of the training it begins: 30
epochs of 1,000 images at the measured speed. The paper gives 0.2 to 0.7% for a language model (Figure 5). Weights are
random, so nothing is downloaded; how many batches EVA needs to converge may differ with pre-trained ones.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from benchmarks.harness import CannotRunError, Figure, Figures, bare_trainer, quiet
from benchmarks.vtab.images import TaskImages
from eva_lightning.callback import EVAInitCallback
from eva_lightning.errors import InputError
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.module import ImageClassifier

TRAINING_IMAGES = 1000
TRAINING_EPOCHS = 30


@dataclass(frozen=True)
class Trial:
    """One size of training.

    Attributes:
        model: timm name or alias.
        image_size: Height and width, in pixels.
        batch_size: Images per step.
        rank: LoRA rank; EVA's mean rank.
        steps: Steps of training; the first third warms up.
        accelerator, precision: Lightning's.
    """

    model: str = "dinov2_g14"
    image_size: int = 224
    batch_size: int = 64
    rank: int = 16
    steps: int = 12
    accelerator: str = "gpu"
    precision: str = "bf16-mixed"


def measure(source: TaskImages, trial: Trial | None = None) -> Figures:
    """Time training steps, then EVA's initialisation.

    Args:
        source: Root and task.
        trial: What to train; None for the paper's largest setting.

    Returns:
        ``images_per_second`` (LoRA, median step), ``peak_memory_gib`` (0 without a GPU), ``eva_init_s``,
        ``eva_init_batches``, and ``eva_init_share_percent``: of the time that the training takes. No targets: the
        paper's figures are for other models.

    Raises:
        CannotRunError: There is no GPU.
        InputError: The GPU has too little memory; says what was tried.
    """
    trial = trial or Trial()
    on_gpu = trial.accelerator == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise CannotRunError("it needs a CUDA GPU and torch finds none on this machine")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        clock, _ = _fit(source, "lora", trial, trial.steps)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        _, callbacks = _fit(source, "eva", trial, 1)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        size = f"{trial.model} at batch size {trial.batch_size} and {trial.image_size} pixels"
        raise InputError(f"{size} does not fit the {total:.0f} GiB of this GPU") from None
    state = next(callback.state for callback in callbacks if isinstance(callback, EVAInitCallback))
    assert state is not None
    speed = trial.batch_size / statistics.median(clock.seconds[max(1, trial.steps // 3) :])
    figures = {
        "images_per_second": speed,
        "peak_memory_gib": peak,
        "eva_init_s": state.seconds,
        "eva_init_batches": state.n_batches,
        "eva_init_share_percent": 100 * state.seconds / (TRAINING_IMAGES * TRAINING_EPOCHS / speed),
    }
    return {name: Figure.of([value]) for name, value in figures.items()}


def _fit(source: TaskImages, method: str, trial: Trial, steps: int) -> tuple[_Steps, list[Any]]:
    """Train for some steps; gives their times and the method's callbacks."""
    clock = _Steps()
    images = trial.steps * trial.batch_size if source.root is None else TRAINING_IMAGES
    with quiet(), source.data(images, trial.image_size, trial.batch_size) as data:
        module = ImageClassifier(trial.model, data.num_classes, trial.image_size)
        callbacks = apply_method(method, module, AdapterOptions(rank=trial.rank))
        trainer = bare_trainer(
            accelerator=trial.accelerator,
            precision=trial.precision,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*callbacks, clock],
        )
        trainer.fit(module, datamodule=data)
    return clock, callbacks


class _Steps(L.Callback):
    """Seconds of every step, the wait for its batch included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
