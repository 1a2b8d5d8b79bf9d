"""Learning-rate schedules, set at every step: linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eva_lightning.errors import check_choice

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig  # its name since Lightning 2.5.3

Schedule = Callable[[int, int, int], float]
"""``schedule(step, warmup_steps, total_steps)``: the factor on the learning rate of step 0, 1, ..., total_steps - 1."""


def warmup_cosine(step: int, warmup_steps: int, total_steps: int, lowest: float = 0.0) -> float:
    """Linear from ``1 / warmup_steps`` to 1, then a half cosine towards `lowest` (EVA paper, sections D.2 and E.2)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return lowest + (1.0 - lowest) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def warmup_cosine_authors(step: int, warmup_steps: int, total_steps: int) -> float:
    """As :func:`warmup_cosine`, but 1 is held for one step only and the last step lies just beyond the minimum.

    That is the authors' ``schedules/warmup_cosine_schedule.py``: i / (n - 1) for i = 1, ..., n steps after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    steps = total_steps - warmup_steps
    i = min(step, total_steps - 1) - warmup_steps + 1
    return 0.5 * (1.0 + math.cos(math.pi * i / max(1, steps - 1)))


SCHEDULES: dict[str, Schedule] = {"cosine": warmup_cosine, "cosine-authors": warmup_cosine_authors}


def named_schedule(name: str) -> Schedule:
    """The schedule called `name`.

    Raises:
        InputError: No such schedule; names the nearest.
    """
    check_choice("schedule", name, SCHEDULES)
    return SCHEDULES[name]


def set_per_step(optimizer: Optimizer, factor: Callable[[int], float]) -> OptimizerLRSchedulerConfig:
    """What ``configure_optimizers`` returns for learning rates times ``factor(step)``, set at every step."""
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}
