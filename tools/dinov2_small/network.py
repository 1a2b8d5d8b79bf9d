"""timm's model of an architecture."""

from __future__ import annotations

import timm
from torch import nn

from tools.dinov2_small.release import Architecture


def create_network(architecture: Architecture, side: int | None = None) -> nn.Module:
    """timm's model at random, without a head, for images of `side` x `side` patches (the position embedding's own
    number for None)."""
    pixels = architecture.patch * (side or architecture.grid)
    model: nn.Module = timm.create_model(architecture.name, img_size=pixels, num_classes=0, **architecture.options)
    return model.eval()
