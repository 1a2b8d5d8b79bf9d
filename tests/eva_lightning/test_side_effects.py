"""Nothing is left changed: generators, metrics, buffers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from eva_lightning.side_effects import isolated_rng, observing, restored_sources


def draw() -> tuple[Any, ...]:
    return random.random(), np.random.rand(), float(torch.rand(1))  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_global_generators_come_back(fails: bool) -> None:
    with isolated_rng():
        expected = draw()
    try:
        with isolated_rng():
            draw()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert draw() == expected


class Noisy(Dataset[Any]):
    """Draws from generators of its own, as augmentations do, and counts."""

    def __init__(self) -> None:
        self.numpy = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)
        self.python = random.Random(0)
        self.torch = torch.Generator().manual_seed(0)
        self.transform = [{"inner": np.random.default_rng(1)}]
        self.reads = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        self.reads += 1
        noise = self.numpy.random() + self.legacy.rand() + self.python.random() + self.transform[0]["inner"].random()
        return torch.rand(2, generator=self.torch) + noise + i


class Counting(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize(
    "sampler", [Counting, lambda: RandomSampler(range(8), generator=torch.Generator().manual_seed(1))]
)
def test_sources_give_the_same_again(sampler: Any) -> None:
    data = DataLoader(Noisy(), 4, sampler=sampler())
    with restored_sources(data):
        first = torch.cat(list(data))
    assert data.dataset.reads == 0  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(list(data)), first)


def test_metrics_and_buffers_come_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
            self.mean = torchmetrics.MeanMetric()

    model = Model()
    y = torch.tensor([0, 1, 2])
    model.accuracy(torch.eye(3), y)
    model.mean.update(2.0)
    with observing(model):
        assert not model.norm.training
        model.accuracy(torch.zeros(3, 3), y)
        model.mean.update(100.0)
        model.norm.train()
        model.norm(torch.randn(8, 3) + 5)
    assert model.norm.training
    assert not model.norm.running_mean.any()  # type: ignore[union-attr]
    assert float(model.accuracy.compute()) == 1.0
    assert float(model.mean.compute()) == 2.0


def test_buffers_replaced_by_a_forward_come_back() -> None:
    class Replacing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.seen + 1
            return x

    module = Replacing()
    before = module.seen
    with observing(module):
        module(torch.ones(1))
    assert module.seen is before
    assert float(module.seen) == 0.0
