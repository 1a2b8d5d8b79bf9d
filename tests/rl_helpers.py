"""Data of the Decision Transformer's kind for tests, without a simulator."""

from __future__ import annotations

import torch
from torch import Tensor


def windows(n: int = 8) -> list[dict[str, Tensor]]:
    """Windows of four steps, to be put into batches by a DataLoader."""
    g = torch.Generator().manual_seed(0)
    return [
        {
            "states": torch.randn(4, 39, generator=g),
            "actions": torch.rand(4, 4, generator=g),
            "rewards": torch.rand(4, generator=g),
            "returns_to_go": torch.rand(4, generator=g),
            "timesteps": torch.arange(4),
            "mask": torch.ones(4, dtype=torch.bool),
        }
        for _ in range(n)
    ]
