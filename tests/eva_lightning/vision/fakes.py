"""A VTAB-1K task folder in miniature: the official layout, small images whose colour tells the class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train800": 16, "val200": 8, "test": 12}


def make_task(
    root: Path, task: str = "kitti", classes: int = 4, size: int = 40, counts: dict[str, int] | None = None
) -> Path:
    """Write ``root/task`` with images of `classes` classes in turn; returns the task folder."""
    folder = root / task
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 255, (classes, 3))
    lines: dict[str, list[str]] = {}
    for split, count in (counts or COUNTS).items():
        lines[split] = []
        for index in range(count):
            label = index % classes
            pixels = colours[label] + generator.integers(-30, 30, (size, size + 8, 3))
            name = f"images/{split}_{index:03d}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
            lines[split].append(f"{name} {label}")
    for split, content in lines.items():
        write_lines(folder, split, content)
    write_lines(folder, "train800val200", lines["train800"] + lines["val200"])
    return folder


def write_lines(folder: Path, split: str, lines: Sequence[str]) -> None:
    """Write a split file."""
    (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
