from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from eva_lightning.optim.schedules import warmup_cosine, warmup_cosine_authors


def test_schedule_is_torchs_linear_warm_up_then_cosine() -> None:
    total, warmup = 60, 6
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, end_factor=1, total_iters=warmup - 1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup),
        ],
        milestones=[warmup],
    )
    for step in range(total):
        assert warmup_cosine(step, warmup, total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR itself steps by epoch number
            schedule.step()
    assert warmup_cosine(total, warmup, total) == pytest.approx(0)


def test_schedule_without_warm_up_and_all_warm_up() -> None:
    assert warmup_cosine(0, 0, 10) == 1
    assert warmup_cosine(9, 10, 10) == 1
    assert warmup_cosine_authors(9, 10, 10) == 1
    assert warmup_cosine_authors(9, 9, 10) == pytest.approx(0)


def test_authors_schedule_is_their_list_of_factors() -> None:
    """``schedules/warmup_cosine_schedule.py`` of vtab1k-pytorch, for 30 epochs of 12 steps and "warmup-cosine-10%"."""
    total, warmup = 360, int(360 / 10)
    cosine = total - warmup
    theirs = torch.linspace(0, 1, warmup + 1)[1:].tolist()
    theirs += [(1 + math.cos(math.pi * (i / (cosine - 1)))) / 2 for i in range(1, cosine + 1)]
    assert len(theirs) == total
    ours = [warmup_cosine_authors(step, warmup, total) for step in range(total)]
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert ours != pytest.approx([warmup_cosine(step, warmup, total) for step in range(total)], abs=1e-4)
