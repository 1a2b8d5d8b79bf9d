"""Minibatches of images: photographs from a folder, or noise with their spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.models import N_CLASSES
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.data.datamodule import NORMALIZATIONS
from eva_lightning.vision.data.images import load_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")


@dataclass(frozen=True)
class Images:
    """Minibatches ``(images (B, 3, H, W), labels (B,))`` in memory, and a sentence that says what they show."""

    batches: list[tuple[Tensor, Tensor]]
    source: str


def make_images(folder: str | Path | None, n_batches: int, batch_size: int, size: int, seed: int) -> Images:
    """Distinct normalised images: a random choice of a folder's, or noise.

    The noise is in colours and has a power that falls with frequency as in photographs. It has less structure than a
    data set: minibatches resemble each other more than with real data.

    Raises:
        MissingInputError: The folder does not exist.
        InputError: It holds too few images, or one that cannot be decoded.
    """
    n = n_batches * batch_size
    rng = np.random.default_rng(seed)
    if folder is not None:
        pixels, source = _of_folder(Path(folder), n, size, rng)
    else:
        pixels, source = np.stack([_noise(size, rng) for _ in range(n)]), f"{n} images of 1/f colour noise"
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    labels = torch.from_numpy(rng.integers(0, N_CLASSES, n))
    batches = []
    for i in range(0, n, batch_size):
        part = torch.from_numpy(pixels[i : i + batch_size]).float() / 255
        batches.append(((part - mean) / std, labels[i : i + batch_size]))
    return Images(batches, source)


def _of_folder(folder: Path, n: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    if not folder.is_dir():
        raise MissingInputError(f"images: {folder} is not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < n:
        raise InputError(f"images: {folder} holds {len(files)}, {n} are needed: lower --batches or --batch-size")
    chosen = rng.choice(len(files), n, replace=False)
    pixels = np.stack([load_image(files[i], size) for i in chosen])
    return pixels, f"{n} images drawn from the {len(files)} in folder {folder.resolve().name}"


def _noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Amplitude falls as f**-a with a near 1, as in photographs; the channels are correlated."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size))) * frequency ** -rng.uniform(0.8, 1.4)
    field = np.fft.irfft2(spectrum, s=(size, size))
    field -= field.mean(axis=(1, 2), keepdims=True)
    field /= field.std(axis=(1, 2), keepdims=True)
    mixing = 0.8 + 0.3 * rng.standard_normal((3, 3))
    field = np.einsum("ij,jhw->ihw", mixing, field)
    field = field / field.std() * rng.uniform(25, 70) + rng.uniform(60, 190, (3, 1, 1))
    return np.clip(field, 0, 255).astype(np.uint8)
