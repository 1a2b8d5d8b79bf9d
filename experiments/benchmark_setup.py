"""What the benchmark runs on: images, a classifier whose random weights have realistic spectra, and the machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from eva_lightning.errors import InputError, MissingInputError

if TYPE_CHECKING:
    from eva_lightning.vision.module import ImageClassifier

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in experiments.vtab
N_CLASSES = 102
_PACKAGES = ("torch", "lightning", "peft", "timm", "numpy")


@dataclass(frozen=True)
class Images:
    """Minibatches ``(images (B, 3, H, W), labels (B,))`` in memory, and a sentence that says what they show."""

    batches: list[tuple[Tensor, Tensor]]
    source: str


def make_images(folder: Path | None, n_batches: int, batch_size: int, size: int, seed: int) -> Images:
    """Distinct normalised images: a random choice of a folder's, or of what scikit-learn ships and noise.

    Without a folder, half of the images are random resized crops of scikit-learn's two photographs and half are colour
    noise whose power falls with frequency as in photographs. Two photographs have less variety than a data set: the
    spectra decay faster, and minibatches resemble each other more, than with real data.

    Raises:
        MissingInputError: The folder does not exist.
        InputError: It holds too few images, or one that cannot be decoded.
    """
    n = n_batches * batch_size
    rng = np.random.default_rng(seed)
    if folder is not None:
        pixels, source = _of_folder(folder, n, size, rng)
    else:
        pixels, source = _of_package(n, size, rng)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    labels = torch.from_numpy(rng.integers(0, N_CLASSES, n))
    batches = []
    for i in range(0, n, batch_size):
        part = torch.from_numpy(pixels[i : i + batch_size]).float() / 255
        batches.append(((part - mean) / std, labels[i : i + batch_size]))
    return Images(batches, source)


def _of_folder(folder: Path, n: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    from eva_lightning.vision.data.images import load_image

    if not folder.is_dir():
        raise MissingInputError(f"--images {folder} is not a folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < n:
        raise InputError(
            f"--images {folder} holds {len(files)} images, {n} are needed: lower --batches or --batch-size"
        )
    chosen = rng.choice(len(files), n, replace=False)
    pixels = np.stack([load_image(files[i], size) for i in chosen])
    return pixels, f"{n} images drawn from the {len(files)} in folder {folder.resolve().name}"


def _of_package(n: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    pixels = np.empty((n, 3, size, size), dtype=np.uint8)
    for i in range(n):
        if rng.random() < 0.5:
            pixels[i] = _crop(photographs[rng.integers(len(photographs))], size, rng)
        else:
            pixels[i] = _noise(size, rng)
    return pixels, f"{n} images made from scikit-learn: random crops of its two photographs, and 1/f colour noise"


def _crop(image: Any, size: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    width, height = image.size
    share, ratio = rng.uniform(0.05, 0.8), np.exp(rng.uniform(-0.3, 0.3))
    w = min(width, max(8, round(np.sqrt(share * width * height * ratio))))
    h = min(height, max(8, round(np.sqrt(share * width * height / ratio))))
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    values = np.asarray(crop, dtype=np.float64).transpose(2, 0, 1)
    if rng.random() < 0.5:
        values = values[:, :, ::-1]
    contrast, offset = rng.uniform(0.6, 1.2, (3, 1, 1)), rng.uniform(-30, 30, (3, 1, 1))
    return np.clip((values - 128) * contrast + 128 + offset, 0, 255).astype(np.uint8)


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


def build_classifier(model: str, image_size: int, weights: Path | None, seed: int) -> ImageClassifier:
    """The project's :class:`~eva_lightning.vision.module.ImageClassifier`, from a weight file or realistic at random.

    Raises:
        MissingInputError, InputError: unknown model, unsuitable image size, missing or unreadable weights.
    """
    from eva_lightning.vision.backbone.timm_models import resolve_model
    from eva_lightning.vision.backbone.weights import resolve_weights
    from eva_lightning.vision.module import ImageClassifier

    resolved = resolve_weights(resolve_model(model), "none" if weights is None else str(weights))
    torch.manual_seed(seed)
    classifier = ImageClassifier(model, N_CLASSES, image_size, resolved)
    if weights is None:
        randomise_realistically(classifier.model, seed)
    return classifier


@torch.no_grad()
def randomise_realistically(model: nn.Module, seed: int, power: float = 0.4) -> None:
    """Give a freshly built ViT weights whose spectra decay as those of trained ones do, roughly.

    Freshly drawn matrices have flat spectra, LayerScale starts at 1e-5 and biases at 0: every direction would carry
    the same variance and no block would change its input. Here the singular values of every matrix fall as
    ``i**-power`` between random orthogonal factors, at a gain that keeps activations of order one. Patch filters are
    band-passes as trained ones are, or brightness would be all that is left of an image; queries and keys are larger,
    or attention would average over all tokens; norms, biases and LayerScale vary per channel. The activations' spectra
    also depend on the images: the benchmark prints their decay.
    """
    generator = torch.Generator().manual_seed(seed)
    head = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(_band_passes(module.weight.shape, generator))
        elif isinstance(module, nn.Linear):
            module.weight.copy_(_power_law(module.weight.shape[0], module.weight.shape[1], power, generator))
            if name.endswith("qkv"):
                module.weight[: 2 * module.weight.shape[0] // 3] *= 2.0
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            module.weight.copy_((0.4 * torch.randn(module.weight.shape, generator=generator)).exp())
        elif type(module).__name__ == "LayerScale":
            gamma: Any = module.gamma
            gamma.copy_(0.1 + 0.3 * torch.rand(gamma.shape, generator=generator))
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    for embedding_name in ("pos_embed", "cls_token", "reg_token"):
        embedding = getattr(model, embedding_name, None)
        if isinstance(embedding, nn.Parameter):
            embedding.copy_(0.3 * torch.randn(embedding.shape, generator=generator))


def _power_law(rows: int, columns: int, power: float, generator: torch.Generator) -> Tensor:
    """A matrix with singular values ``i**-power``, scaled to the Frobenius norm of one with N(0, 1/columns) entries."""
    k = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, k, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, k, generator=generator)).Q
    values = torch.arange(1, k + 1, dtype=torch.float32) ** -power
    values *= rows**0.5 / values.norm()
    return (left * values) @ right.T


def _band_passes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random filters ``(out, in, h, w)`` whose amplitude rises with frequency f and falls beyond 0.2 cycles a pixel.

    Photographs' amplitude falls as 1/f, so responses have similar variance from the lowest frequencies to that.
    """
    height, width = shape[-2:]
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    gain = frequency.clamp_min(0.25 / max(height, width)) * torch.exp(-((frequency / 0.2) ** 2))
    filters = torch.fft.irfft2(torch.fft.rfft2(torch.randn(shape, generator=generator)) * gain, s=(height, width))
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, load, versions; nothing that names the machine or its user."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    machine: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "versions": versions,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["versions"]["cuda"] = torch.version.cuda
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
