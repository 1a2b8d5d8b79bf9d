"""The paper's largest setting on a GPU: DINOv2-g/14, LoRA of rank 16, batch 64, bfloat16.

Images per second and peak memory of training, and the time of EVA's initialisation ÷ that of the training it begins: 30
epochs of 1,000 images at the measured speed. The paper gives 0.2 to 0.7% for a language model (Figure 5). Weights are
random, so nothing is downloaded; how many batches EVA needs to converge may differ with pre-trained ones.
"""

from __future__ import annotations

import statistics
import time
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import lightning as L

from eva_lightning.errors import InputError

if TYPE_CHECKING:
    from experiments.vtab.benchmark import Settings

#: No target: the paper's figures are for other models.
TARGETS: dict[str, str] = {}

TRAINING_IMAGES = 1000
TRAINING_EPOCHS = 30


def why_not() -> str | None:
    """Why this part cannot run on this machine; None where it can."""
    import torch

    return None if torch.cuda.is_available() else "it needs a CUDA GPU and torch finds none on this machine"


def measure(
    settings: Settings,
    model: str = "dinov2_g14",
    image_size: int = 224,
    batch_size: int = 64,
    rank: int = 16,
    steps: int = 12,
    accelerator: str = "gpu",
    precision: str = "bf16-mixed",
) -> dict[str, float]:
    """Time training steps, then EVA's initialisation.

    Args:
        settings: Root and task.
        model: timm name or alias.
        image_size: Height and width, in pixels.
        batch_size: Images per step.
        rank: LoRA rank; EVA's mean rank.
        steps: Steps of training; the first third warms up.
        accelerator, precision: Lightning's.

    Returns:
        ``images_per_second`` (LoRA, median step), ``peak_memory_gib`` (0 without a GPU), ``eva_init_s``,
        ``eva_init_batches``, and ``eva_init_share``: of the time that the training takes, in percent.

    Raises:
        InputError: The GPU has too little memory; says what was tried.
    """
    import torch

    from eva_lightning.callback import EVAInitCallback

    on_gpu = accelerator == "gpu"
    images = steps * batch_size if settings.root is None else TRAINING_IMAGES
    trial: dict[str, Any] = {
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "rank": rank,
        "accelerator": accelerator,
        "precision": precision,
        "images": images,
    }
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        clock, _ = _fit(settings, "lora", steps, **trial)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        _, callbacks = _fit(settings, "eva", 1, **trial)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        raise InputError(
            f"{model} at batch size {batch_size} and {image_size} pixels does not fit the {total:.0f} GiB of this GPU"
        ) from None
    state = next(callback.state for callback in callbacks if isinstance(callback, EVAInitCallback))
    assert state is not None
    speed = batch_size / statistics.median(clock.seconds[max(1, steps // 3) :])
    return {
        "images_per_second": speed,
        "peak_memory_gib": peak,
        "eva_init_s": state.seconds,
        "eva_init_batches": state.n_batches,
        "eva_init_share_percent": 100 * state.seconds / (TRAINING_IMAGES * TRAINING_EPOCHS / speed),
    }


def _fit(
    settings: Settings,
    method: str,
    steps: int,
    *,
    model: str,
    image_size: int,
    batch_size: int,
    rank: int,
    accelerator: str,
    precision: str,
    images: int,
) -> tuple[_Steps, list[Any]]:
    """Train for some steps; gives their times and the method's callbacks."""
    from eva_lightning.methods.vision import AdapterOptions, apply_method
    from eva_lightning.vision.data.datamodule import VTAB1K
    from eva_lightning.vision.module import ImageClassifier
    from experiments.demo_runs import quiet
    from experiments.vtab.benchmark_images import task_folder

    clock = _Steps()
    with quiet(), task_folder(settings.root, settings.task, images) as (root, task), TemporaryDirectory() as cache:
        data = VTAB1K(
            root, task, image_size=image_size, batch_size=batch_size, limit_train=images, limit_test=1,
            cache_dir=cache, progress=False,
        )  # fmt: skip
        module = ImageClassifier(model, data.num_classes, image_size)
        callbacks = apply_method(method, module, AdapterOptions(rank=rank))
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[*callbacks, clock],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
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
            import torch

            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now
