from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.schedules import warmup_cosine


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


def test_layer_decay_is_a_power_per_layer_counted_from_the_head() -> None:
    module = ImageClassifier("test_vit", num_classes=5, image_size=32, lr=1.0, layer_decay=0.75)
    lr = {id(p): group["lr"] for group in module._parameter_groups() for p in group["params"]}
    assert len(lr) == len(list(module.parameters()))
    model = module.model
    blocks = model.blocks
    depth = len(blocks)  # type: ignore[arg-type]
    assert lr[id(module.get_submodule(module.head_name).weight)] == 1.0
    for index, block in enumerate(blocks):  # type: ignore[arg-type]
        for parameter in block.parameters():
            assert lr[id(parameter)] == pytest.approx(0.75 ** (depth - index))
    assert lr[id(model.pos_embed)] == pytest.approx(0.75 ** (depth + 1))
    assert {group["weight_decay"] for group in module._parameter_groups()} == {0.05}


def test_only_the_head_for_linear_probing() -> None:
    module = ImageClassifier("test_vit", num_classes=5, image_size=32)
    module.train_only_head()
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["model.head.weight", "model.head.bias"]


def test_first_loss_is_that_of_guessing() -> None:
    module = ImageClassifier("test_vit", num_classes=7, image_size=32)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    loss = nn.functional.cross_entropy(module(images), labels)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(7.0)).item(), abs=1e-2)
