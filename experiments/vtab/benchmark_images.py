"""The images that the benchmarks of VTAB-1K run on: a user's task folder, or made-up ones in its layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

#: The task whose name and classes the made-up images take.
MADE_UP = "eurosat"


@contextmanager
def task_folder(
    root: str | None, task: str, images: int, height: int = 240, width: int = 320
) -> Iterator[tuple[Path, str]]:
    """Root and task of `images` training images (more where the user's folder has more).

    Args:
        root: The user's folder; None for JPEG files of that size, made up and deleted afterwards.
        task: The user's task.
        images: How many to make up.
        height, width: Of the made-up images, in pixels; the defaults are about Caltech101's.
    """
    if root is not None:
        yield Path(root), task
        return
    with TemporaryDirectory() as folder:
        _make_up(Path(folder) / MADE_UP, images, height, width)
        yield Path(folder), MADE_UP


def _make_up(folder: Path, images: int, height: int, width: int) -> None:
    """Smooth noise, which compresses about as photographs do, in classes that take turns."""
    import numpy as np
    from PIL import Image

    from eva_lightning.vision.data.tasks import TASKS

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for index in range(images):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        name = f"{index:04d}.jpg"
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / name, quality=90)
        lines.append(f"{name} {index % TASKS[MADE_UP].classes}\n")
    for split in ("train800val200", "test"):
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
