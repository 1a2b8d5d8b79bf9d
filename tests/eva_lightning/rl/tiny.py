"""A tiny pre-trained Decision Transformer and real demonstrations of one task, for tests of commands."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eva_lightning.rl.collection import collect
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule

TASK = "handle-press-side-v3"


def make_robot(
    folder: Path, *, episodes: int = 4, horizon: int = 30, layers: int = 2, about: Mapping[str, Any] | None = None
) -> Path:
    """Write ``data`` (demonstrations of `TASK`) and ``init.ckpt`` (random weights) to `folder`, and return it."""
    collect([TASK], episodes, folder / "data", horizon=horizon, progress=False)
    torch.manual_seed(7)
    data = TrajectoryDataModule(folder / "data", [TASK], context=4, val_episodes=1)
    sizes: dict[str, Any] = {"width": 16, "layers": layers, "heads": 2, "context": 4}
    save_weights(DecisionTransformerModule(**data.statistics, **sizes), folder / "init.ckpt", about=about)
    return folder
