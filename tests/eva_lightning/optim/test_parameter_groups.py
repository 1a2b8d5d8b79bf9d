from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from eva_lightning.optim.parameter_groups import layer_decay, parameter_groups
from eva_lightning.vision.module import ImageClassifier


def values(module: ImageClassifier) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay by parameter name."""
    names = {id(p): name for name, p in module.named_parameters()}
    groups = module._parameter_groups()
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_one_group_by_default() -> None:
    module = ImageClassifier("test_vit", 5, 32, lr=0.5)
    assert [(g["lr"], g["weight_decay"]) for g in module._parameter_groups()] == [(0.5, 0.05)]


def test_weight_decay_on_matrices_only_is_timms_division() -> None:
    module = ImageClassifier("test_vit", 5, 32, decay_matrices_only=True)
    from timm.optim import param_groups_weight_decay

    theirs = {id(p): g["weight_decay"] for g in param_groups_weight_decay(module, 0.05) for p in g["params"]}
    ours = {id(p): g["weight_decay"] for g in module._parameter_groups() for p in g["params"]}
    assert ours == theirs
    assert {0.0, 0.05} == set(ours.values())


def test_layer_decay_is_timms() -> None:
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("test_vit")
    by_name = layer_decay(model, 0.75)
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.75) for p in g["params"]}
    assert {id(p): by_name[name] for name, p in model.named_parameters()} == theirs


@pytest.mark.parametrize("split", [False, True])
def test_everything_composes(split: bool) -> None:
    module = ImageClassifier("test_vit", 5, 32, lr=1.0, layer_decay=0.5, decay_matrices_only=True, split_fused=split)
    module.lr_multipliers = lambda name: 16.0 if name.endswith("qkv.q.weight") else 1.0
    found = values(module)
    assert len(found) == len(list(module.parameters()))
    last = len(module.model.blocks) - 1  # type: ignore[arg-type]
    assert found["model.head.weight"] == (1.0, 0.05)
    assert found[f"model.blocks.{last}.mlp.fc1.weight"] == (0.5, 0.05)
    assert found[f"model.blocks.{last}.mlp.fc1.bias"] == (0.5, 0.0)
    if split:
        assert found[f"model.blocks.{last}.attn.qkv.q.weight"] == (8.0, 0.05)
        assert found[f"model.blocks.{last}.attn.qkv.v.weight"] == (0.5, 0.05)


def test_frozen_parameters_stay_out_and_order_is_that_of_the_module() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    (group,) = parameter_groups(layer.named_parameters(), 0.1, 0.0)
    assert len(group["params"]) == 1
    assert group["params"][0] is layer.weight


def test_bad_multiplier_and_model_without_order() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="multiplier of weight must be at least 0, got -1"):
        parameter_groups(layer.named_parameters(), 0.1, 0.0, multipliers=[lambda name: -1.0])
    with pytest.raises(ValueError, match="Linear does not say in which order its layers come"):
        layer_decay(layer, 0.75)


def test_optimizer_takes_the_groups() -> None:
    module = ImageClassifier("test_vit", 5, 32, layer_decay=0.75, decay_matrices_only=True)
    optimizer = torch.optim.AdamW(module._parameter_groups())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))
