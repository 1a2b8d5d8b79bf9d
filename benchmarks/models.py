"""Classifiers to measure: with weights from a file, with random ones whose spectra are realistic, or with none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.vision.module import ImageClassifier
from experiments.vtab.weights import obtain_weights

N_CLASSES = 102


def build_classifier(model: str, image_size: int, weights: str | None, seed: int) -> ImageClassifier:
    """The project's :class:`~eva_lightning.vision.module.ImageClassifier`, from given weights or realistic at random.

    Raises:
        MissingInputError, InputError: unknown model, unsuitable image size, missing or unreadable weights.
    """
    resolved = obtain_weights(model, weights or "none")
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


def build_empty(model: str, image_size: int, precision: str) -> ImageClassifier:
    """A classifier whose weights are allocated and never written: their values do not matter here.

    Raises:
        InputError: Unknown model or unsuitable image size.
    """
    with torch.device("meta"):
        classifier = ImageClassifier(model, N_CLASSES, image_size)
    if precision == "bf16-true":
        classifier.to(torch.bfloat16)
    classifier.model.to_empty(device="cpu")
    for module in classifier.model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # type: ignore[operator]
    # its metrics are on the meta device too: take those of a small one
    small = ImageClassifier("test_vit", N_CLASSES, 32)
    for name, child in small.named_children():
        if name != "model":
            setattr(classifier, name, child)
    return classifier
