"""A folder of small photographs whose colour tells the class, and weights for a small network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

CLASSES = ("ash", "birch", "oak")
COUNTS = (14, 11, 9)


def photographs(folder: Path, counts: tuple[int, ...] = COUNTS) -> Path:
    """Class folders; noise that leaves some images in doubt."""
    noise = np.random.default_rng(0)
    for channel, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = noise.integers(0, 200, (30, 40, 3), dtype=np.uint8)
            pixels[:, :, channel] += noise.integers(0, 55, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.jpg")
    return folder


def weights(file: Path) -> Path:
    """Those of timm's ``test_vit``, drawn once."""
    torch.manual_seed(3)
    save_file(timm.create_model("test_vit").state_dict(), file)
    return file
