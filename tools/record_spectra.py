"""Record what the choice of tokens depends on, of real activations.

    python -m tools.record_spectra --weights FILE --images FOLDER --source "what the images are"

A test of how many tokens a decomposition needs wants real spectra and real tails, but the inputs of one layer of DINOv2
ViT-S/14 over 256 images take hundreds of MB. Of a few hard layers this keeps the eigenvalues of the covariance of their
inputs, and how unevenly tokens contribute (quantiles of a scale per token): from that tokens of any number are drawn.
Directions are left out, because no engine depends on them, and that tokens of one image are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import write_json
from eva_lightning.vision.backbone.timm_models import create_backbone, resolve_model
from eva_lightning.vision.backbone.weights import resolve_weights
from eva_lightning.vision.data.datamodule import NORMALIZATIONS
from eva_lightning.vision.data.images import load_image
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option

LAYERS = ("blocks.1.mlp.fc2", "blocks.1.attn.proj", "blocks.9.attn.qkv")
_MODEL, _SIZE, _K, _QUANTILES = "dinov2_s14", 224, 32, 65


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to record from."""

    weights: str | None = option(None, "weights of dinov2_s14", Role.PLACE)
    images: str | None = option(None, "folder with images", Role.PLACE)
    source: str = option("", "what weights and images are, in a sentence for the file", Role.RESULT)
    output: str = option("tests/eva_lightning/dinov2_s14_spectra.json", "file to write", Role.PLACE)
    n: int = option(64, "images, evenly spaced in the sorted folder", Role.RESULT, at_least=8)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("weights", "images"):
            if getattr(self, name) is None:
                raise InputError(f"--{name} is needed", setting=name)


@torch.no_grad()
def record(settings: Settings) -> dict[str, Any]:
    """Write the file and return what is in it.

    Raises:
        MissingInputError, InputError: Weights or images are missing, or the images are too few.
    """
    weights = resolve_weights(resolve_model(_MODEL), str(settings.weights))
    model = create_backbone(_MODEL, 1, _SIZE, weights).eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name, parts in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, parts=parts: parts.append(args[0]))
    for batch in _pixels(settings).split(8):
        model(batch)
    layers = {name: _summary(torch.cat(parts).flatten(0, 1), model.get_submodule(name)) for name, parts in seen.items()}
    document = {"source": settings.source, "images": settings.n, "layers": layers}
    write_json(settings.output, document)
    return document


def _pixels(settings: Settings) -> Tensor:
    folder = Path(str(settings.images))
    if not folder.is_dir():
        raise MissingInputError(f"images: {folder} is not a folder", setting="images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(files) < settings.n:
        raise InputError(f"images: {folder} holds {len(files)}, --n asks for {settings.n}", setting="images")
    chosen = [files[i * len(files) // settings.n] for i in range(settings.n)]
    pixels = torch.stack([torch.from_numpy(load_image(file, _SIZE)) for file in chosen]).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    return (pixels - mean) / std


def _summary(tokens: Tensor, layer: nn.Module) -> dict[str, Any]:
    """Eigenvalues per token, descending, and quantiles of the scale of a token.

    The scale's fourth power has the mean of (leverage among the top 32) x (variance outside them), each over its mean:
    what the noise of a choice of tokens depends on, see :func:`eva_lightning.svd.token_noise`.
    """
    x = (tokens - tokens.mean(dim=0)).double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    inside = (x @ vectors[:, -_K:]).square()
    leverage = (inside / values[-_K:]).sum(dim=1)
    outside = (x.square().sum(dim=1) - inside.sum(dim=1)).clamp_min(0)
    fourth = leverage / leverage.mean() * outside / outside.mean()
    scale = torch.quantile(fourth.sqrt().sqrt(), torch.linspace(0, 1, _QUANTILES, dtype=torch.float64))
    return {
        "out": layer.out_features,
        "eigenvalues": [float(f"{value:.5g}") for value in values.flip(0).clamp_min(0).tolist()],
        "scale_quantiles": [round(value, 4) for value in scale.tolist()],
    }


COMMAND = SettingsCommand(
    Settings, "python -m tools.record_spectra", "Record spectra of real activations.", "tools.record_spectra:record"
)
main, command_line = COMMAND.main, COMMAND.command_line

if __name__ == "__main__":
    command_line()
