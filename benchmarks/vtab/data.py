"""What decoding once saves: the data time of the first epoch, of the second, and of the first of another run.

Data time is what a run waits for its images: ``setup`` of :class:`~eva_lightning.vision.data.datamodule.VTAB1K` (in the
first epoch: decode, resize, write the cache) and taking every batch from the loader, without a model.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.harness import Figure, Figures
from benchmarks.vtab.images import TaskImages
from eva_lightning.vision.data.datamodule import VTAB1K


def measure(source: TaskImages, images: int = 400, image_size: int = 224, repeats: int = 3) -> Figures:
    """Time the loader's epochs, each time with an empty cache to begin with.

    Args:
        source: Root and task.
        images: Training images, at most.
        image_size: Height and width, in pixels.
        repeats: How often.

    Returns:
        ``second_epoch_ratio``: second epoch ÷ first; ``next_run_ratio``: first epoch of a second run on the same cache
        ÷ first; ``first_epoch_s`` and ``second_epoch_s``.
    """
    firsts, seconds, others = [], [], []
    with source.folder(images) as (root, task):
        for _ in range(repeats):
            with TemporaryDirectory() as cache:
                first, second = _run(root, task, images, image_size, cache)
                other, _ = _run(root, task, images, image_size, cache)
            firsts.append(first)
            seconds.append(second)
            others.append(other)
    return {
        "second_epoch_ratio": Figure.ratio(seconds, firsts, "<= 0.1"),
        "next_run_ratio": Figure.ratio(others, firsts),
        "first_epoch_s": Figure.of(firsts),
        "second_epoch_s": Figure.of(seconds),
    }


def _run(root: Path, task: str, images: int, image_size: int, cache: str) -> tuple[float, float]:
    """Seconds of data in the first two epochs of a run."""
    data = VTAB1K(root, task, image_size=image_size, limit_train=images, limit_test=1, cache_dir=cache, progress=False)
    times = []
    for epoch in range(2):
        started = time.perf_counter()
        if epoch == 0:
            data.setup("fit")
        for _ in data.train_dataloader():
            pass
        times.append(time.perf_counter() - started)
    return times[0], times[1]
