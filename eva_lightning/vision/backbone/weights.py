"""Where a backbone's weights come from: nowhere, a file, or the Hugging Face hub. Resolved before a model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import file_exists, hf_hub_download, try_to_load_from_cache
from timm.models import get_pretrained_cfg

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.backbone.hub import require_hub

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".tar", ".ckpt")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Weights:
    """Resolved weights: `file` on disk, or ``file=None`` for timm's own download (`pretrained`) or random weights.

    A file named by the user is loaded strictly (`strict`); timm's own files may lack or exceed the backbone's keys.
    """

    pretrained: bool
    file: Path | None = None
    strict: bool = False


def resolve_weights(model: str, weights: str) -> Weights:
    """Turn ``"pretrained"``, ``"none"`` or a file path into weights that are known to be obtainable.

    Args:
        model: timm name, as :func:`~eva_lightning.vision.backbone.timm_models.resolve_model` gives it.
        weights: The user's choice.

    Raises:
        MissingInputError: The file does not exist.
        InputError: timm has no pre-trained weights of this model, or the path is no weight file.
        UnreachableError: The weights are neither in the local hub cache nor does the hub answer within seconds.
    """
    if weights == "none":
        return Weights(pretrained=False)
    if weights != "pretrained":
        return Weights(pretrained=True, file=_weight_file(weights), strict=True)
    config = get_pretrained_cfg(model)
    if config is None or not config.has_weights:
        raise InputError(f"timm has no pre-trained weights of {model}: pass --weights FILE or --weights none")
    cached = cached_file(config.hf_hub_id, config.hf_hub_filename)
    if cached is not None:
        return Weights(pretrained=True, file=cached)
    _require_hub(model, config.hf_hub_id)
    return Weights(pretrained=True)


def _weight_file(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise InputError(f"--weights {path} is a folder: name the weight file in it ({', '.join(SUFFIXES)})")
    if not file.is_file():
        raise MissingInputError(
            f"weight file {path} does not exist: download it (official DINOv2: "
            "https://dl.fbaipublicfiles.com/dinov2/), or pass --weights pretrained or --weights none"
        )
    return file


def cached_file(repository: str | None, filename: str | None) -> Path | None:
    """The file of a repository of the Hugging Face hub that is on this machine, or None."""
    if not repository:
        return None
    for name in (filename,) if filename else _HUB_FILES:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def download(repository: str | None, filename: str | None) -> Path | None:
    """The file of a repository of the Hugging Face hub, from its cache or the hub; None where there is no such file."""
    found = cached_file(repository, filename)
    if found is not None or not repository:
        return found
    for name in (filename,) if filename else _HUB_FILES:
        if file_exists(repository, name):
            return Path(hf_hub_download(repository, name))
    return None


def _require_hub(model: str, repository: str | None) -> None:
    if repository:
        require_hub(
            f"{repository}/resolve/main/config.json",
            f"the pre-trained weights of {model} are not on this machine",
            "pass --weights FILE with a downloaded weight file, or --weights none for random weights",
        )
