"""The images that the benchmarks of VTAB-1K run on: a user's task folder, or made-up ones in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.data.tasks import TASKS

#: The task whose name and classes the made-up images take.
MADE_UP = "eurosat"


@dataclass(frozen=True)
class TaskImages:
    """Where training images come from.

    Attributes:
        root: The user's folder; None for JPEG files that are made up and deleted afterwards.
        task: The user's task.
        height, width: Of the made-up images, in pixels; the defaults are about Caltech101's.
    """

    root: str | None = None
    task: str = "caltech101"
    height: int = 240
    width: int = 320

    @contextmanager
    def folder(self, images: int) -> Iterator[tuple[Path, str]]:
        """Root and task of `images` training images (more where the user's folder has more)."""
        if self.root is not None:
            yield Path(self.root), self.task
            return
        with TemporaryDirectory() as folder:
            self._make_up(Path(folder) / MADE_UP, images)
            yield Path(folder), MADE_UP

    @contextmanager
    def data(self, images: int, image_size: int, batch_size: int) -> Iterator[VTAB1K]:
        """A data module of at most `images` training images, with an empty cache."""
        with self.folder(images) as (root, task), TemporaryDirectory() as cache:
            yield VTAB1K(
                root,
                task,
                image_size=image_size,
                batch_size=batch_size,
                limit_train=images,
                limit_test=1,
                cache_dir=cache,
                progress=False,
            )

    def _make_up(self, folder: Path, images: int) -> None:
        """Smooth noise, which compresses about as photographs do, in classes that take turns."""
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        lines = []
        for index in range(images):
            coarse = rng.integers(0, 256, (self.height // 8, self.width // 8, 3), dtype=np.uint8)
            name = f"{index:04d}.jpg"
            picture = Image.fromarray(coarse).resize((self.width, self.height), Image.Resampling.BICUBIC)
            picture.save(folder / name, quality=90)
            lines.append(f"{name} {index % TASKS[MADE_UP].classes}\n")
        (folder / "train800val200.txt").write_text("".join(lines), encoding="utf-8")
        Image.new("RGB", (self.width, self.height)).save(folder / "test.jpg")
        (folder / "test.txt").write_text("test.jpg 0\n", encoding="utf-8")
