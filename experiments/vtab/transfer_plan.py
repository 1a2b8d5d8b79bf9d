"""How long the transfer experiment takes: a few updates of each kind of method, timed."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.vtab.transfer_runs import Variant, halves

if TYPE_CHECKING:
    from experiments.vtab.transfer import Settings

#: Kind of method -> one that has its cost and whose adapters are put in at once.
KINDS = ("linear", "fft", "lora", "dora")

#: Seconds that a run takes besides updates and looks: building, EVA's streaming, Lightning's start.
_PER_RUN = 1.0

#: Rates that tuning tries per method beyond the first grid, on average.
_BEYOND = 1.0


def kind_of(variant: Variant) -> str:
    """Which of `KINDS` has the cost of `variant`."""
    if variant.method is None:
        return "fft"
    if variant.method in KINDS:
        return variant.method
    return "dora" if "dora" in variant.method else "lora"


def measure_speed(settings: Settings) -> dict[str, tuple[float, float]]:
    """Processor seconds per training image and per image looked at, by kind of method, in one thread.

    Time of the processor, so that what else the machine does counts little.
    """
    import torch
    from torch.nn import functional as F

    from eva_lightning.methods.vision import AdapterOptions, apply_method
    from eva_lightning.vision.module import ImageClassifier
    from experiments.vtab.transfer_model import IMAGE_SIZE, MODEL

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    n = settings.batch_size
    images = torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.randint(0, 50, (n,), generator=generator)
    found = {}
    try:
        for kind in {kind_of(variant) for variant in settings.variants}:
            module = ImageClassifier(MODEL, 50, IMAGE_SIZE)
            apply_method(kind, module, AdapterOptions(rank=settings.rank))
            optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
            updates, looks = [], []
            for _ in range(8):
                started = time.process_time()
                optimizer.zero_grad()
                F.cross_entropy(module(images), labels).backward()
                optimizer.step()
                updates.append(time.process_time() - started)
                started = time.process_time()
                with torch.no_grad():
                    module(images)
                looks.append(time.process_time() - started)
            found[kind] = statistics.median(updates[2:]) / n, statistics.median(looks[2:]) / n
    finally:
        torch.set_num_threads(threads)
    return found


def plan(settings: Settings) -> str:
    """What there is to do, and how long it takes by the speed measured now."""
    parts = halves(settings.root, settings.split_seed, settings.train_images, settings.validation_images)
    speed = measure_speed(settings)
    tuned = [variant for variant in settings.variants if variant.key not in settings.given_rates]
    rates = len(settings.learning_rates) + min(_BEYOND, settings.extend)
    tuning = comparison = 0.0
    for variant in settings.variants:
        update, look = speed[kind_of(variant)]
        comparison += len(parts.train) * settings.epochs * update + _PER_RUN
        comparison += len(parts.test) * len(settings.look_epochs) * look
        if variant in tuned:
            tuning += len(parts.tuning) * settings.epochs * update + len(parts.validation) * look + _PER_RUN
    tuning *= rates * settings.tune_seeds
    comparison *= settings.seeds
    # pre-training is full training with larger batches; its share is known only where something trains in full
    pretraining = 0.0
    if not settings.weights.is_file():
        update, _ = speed.get("fft", speed[kind_of(settings.variants[0])])
        pretraining = len(parts.pretraining) * settings.pretrain_epochs * update
    workers = max(1, settings.workers)
    n_tuning = round(len(tuned) * rates * settings.tune_seeds)
    n_final = len(settings.variants) * settings.seeds
    finished = sum(1 for folder in ("tuning", "runs") for _ in Path(settings.output, folder).glob("*/metrics.json"))
    words = ", ".join(f"{kind} {1e3 * update * settings.batch_size:.0f}" for kind, (update, _) in sorted(speed.items()))
    grid = f"{len(tuned)} methods x {len(settings.learning_rates)} learning rates and those beyond"
    minutes = (pretraining + tuning + comparison) / 60
    elapsed = (pretraining + (tuning + comparison) / workers) / 60
    lines = [
        (
            f"pre-training: {len(parts.pretraining)} images of {parts.classes[0]} classes, {settings.pretrain_epochs} "
            f"epochs{'' if pretraining else ', finished'}"
        ),
        (
            f"tuning: about {n_tuning} runs ({grid} x {settings.tune_seeds} seeds) on {len(parts.tuning)} images, "
            f"{len(parts.validation)} to choose by"
        ),
        (
            f"comparison: {n_final} runs ({len(settings.variants)} methods x {settings.seeds} seeds) on "
            f"{len(parts.train)} images of {parts.classes[1]} classes, {len(parts.test)} to test on"
        ),
        f"finished: {finished} runs",
        f"measured: processor ms per update of {settings.batch_size} images: {words}",
        (
            f"estimate: {minutes:.0f} core-minutes in all ({pretraining / 60:.0f} + {tuning / 60:.0f} + "
            f"{comparison / 60:.0f}), {elapsed:.0f} minutes with {workers} workers on a machine that does nothing else"
        ),
    ]
    return "\n".join(lines)
