"""How large things are: a model and its adapters by method and rank, and what a sweep leaves on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eva_lightning.adapters.targets import find_targets
from eva_lightning.methods.registry import MethodKey
from eva_lightning.vision.backbone.timm_models import classifier_name, create_backbone
from eva_lightning.vision.data.tasks import SPLITS, VTABTask, expected_size
from experiments.vtab.grid import Grid
from experiments.vtab.settings import Settings
from experiments.vtab.sweep_settings import Contender

#: What a final run leaves besides its adapter, and what a tuning run leaves: settings, metrics and log.
_FINAL_FOLDER, _TUNING_FOLDER = 100_000, 24_000


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a backbone, counted without building it.

    Attributes:
        parameters: All but the head's.
        widths: Inputs and outputs of each layer that gets an adapter.
        biases: Parameters of its biases.
        features: Inputs of the head.
        depth: Blocks, where it has blocks; else 0.
    """

    parameters: int
    widths: tuple[tuple[int, int], ...]
    biases: int
    features: int
    depth: int

    @classmethod
    def of(cls, settings: Settings) -> ModelSize:
        """Of the model that `settings` name.

        Raises:
            InputError: Unknown model, image size no multiple of its patch size, or no linear head.
        """
        with torch.device("meta"):
            model = create_backbone(
                settings.model,
                2,
                settings.image_size,
                position_embedding=settings.pos_embed,  # type: ignore[arg-type]
                split=settings.rules.split_fused,
            )
        head_name = classifier_name(model)
        head = model.get_submodule(head_name)
        named = nn.ModuleDict({"model": model})  # as a run's module names its layers
        names, _ = find_targets(named, settings.target_modules, head=f"model.{head_name}")
        widths = tuple(width for name in names for width in _widths(named.get_submodule(name)))
        in_head = sum(p.numel() for p in head.parameters())
        sizes = [(name, p.numel()) for name, p in model.named_parameters()]
        biases = sum(n for name, n in sizes if name.endswith("bias") and not name.startswith(f"{head_name}."))
        return cls(
            parameters=sum(n for _, n in sizes) - in_head,
            widths=widths,
            biases=biases,
            features=int(head.in_features),  # type: ignore[arg-type]
            depth=len(getattr(model, "blocks", ())),
        )

    def trained(self, key: MethodKey, rank: int, classes: int, bias: str = "all") -> int:
        """Parameters that a method trains at mean rank `rank`, the head included."""
        head = (self.features + 1) * classes
        if not key.adapts:
            return head + (self.parameters if key.entry.trains == "everything" else 0)
        return sum(rank * (a + b) for a, b in self.widths) + (self.biases if bias == "all" else 0) + head

    def state_bytes(self, components: int) -> int:
        """Of an EVA state on disk."""
        return sum(4 * min(components, wide) * (wide + 2) for wide, _ in self.widths)


def _widths(layer: Any) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's adapters, one or, of an attention, two."""
    if isinstance(layer, nn.MultiheadAttention):
        return [(layer.embed_dim, 3 * layer.embed_dim), (layer.embed_dim, layer.embed_dim)]
    return [(layer.weight[0].numel(), len(layer.weight))]


def cache_bytes(task: VTABTask, image_size: int, splits: Iterable[str] = SPLITS) -> int:
    """Of a task's decoded images, each of whose splits is cached by itself."""
    return sum(expected_size(task, split) for split in splits) * 3 * image_size**2


def missing_cache_bytes(tasks: Iterable[VTABTask], image_size: int, folder: Path | None) -> int:
    """Of the decoded images that are not on disk yet."""
    if folder is None:
        return 0
    return sum(
        cache_bytes(task, image_size, [split])
        for task in tasks
        for split in SPLITS
        if not any(folder.glob(f"{task.name}-{split}-{image_size}px-*.npy"))
    )


def runs_bytes(size: ModelSize, contender: Contender, task: VTABTask, grid: Grid) -> int:
    """Of the folders of a task's and method's runs, at the grid's largest rank."""
    tuning, final = grid.sizes(contender.adapts, contender.searches_rho)
    final *= len(contender.always) + (len(contender.always) < len(contender.keys))
    key = contender.keys[0]
    adapter = 4 * size.trained(key, max(grid.ranks), task.classes) if key.adapts else 0
    return tuning * _TUNING_FOLDER + final * (adapter + _FINAL_FOLDER)
