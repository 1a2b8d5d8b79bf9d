from __future__ import annotations

from typing import Any

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


TINY = {"depth": 2, "embed_dim": 24, "num_heads": 2}
SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2, "img_size": 32}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
#: timm name, what makes it small, and by first names the layers below the head's
LAYERS_BELOW_THE_HEAD: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    # BEiT's rule (its optim_factory.py): d + 2 layers, embeddings in layer 0, block i in i + 1, all else in d + 1
    (
        "vit_small_patch14_reg4_dinov2", TINY,
        {
            "cls_token": 3, "reg_token": 3, "pos_embed": 3, "patch_embed": 3, "blocks.0": 2, "blocks.1": 1,
            "norm": 0, "head": 0,
        },
    ),
    # the norm after pooling instead of the one before
    ("beit_base_patch16_224", TINY, {"cls_token": 3, "patch_embed": 3, "blocks.0": 2, "blocks.1": 1, "fc_norm": 0,
                                     "head": 0}),
    # a norm after the stem, which is no end
    ("vit_base_patch16_clip_224", TINY, {"cls_token": 3, "pos_embed": 3, "patch_embed": 3, "norm_pre": 3,
                                         "blocks.0": 2, "blocks.1": 1, "norm": 0, "head": 0}),
    # attention pooling instead of a class token
    ("vit_base_patch16_siglip_224", TINY, {"pos_embed": 3, "patch_embed": 3, "blocks.0": 2, "blocks.1": 1, "norm": 0,
                                           "attn_pool": 0, "head": 0}),
    # learned rotary embeddings are embeddings
    ("vit_base_patch16_rope_mixed_224", TINY, {"cls_token": 3, "patch_embed": 3, "rope": 3,
                                               "blocks.0": 2, "blocks.1": 1, "norm": 0, "head": 0}),
    # patch merging goes with what follows it
    ("swin_tiny_patch4_window7_224", SWIN, {"patch_embed": 3, "layers.0": 2, "layers.1": 1, "norm": 0, "head": 0}),
    ("convnext_atto", CONVNEXT, {"stem": 5, "stages.0": 4, "stages.1": 3, "stages.2": 2, "stages.3": 1, "head": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "below"), LAYERS_BELOW_THE_HEAD, ids=[x[0] for x in LAYERS_BELOW_THE_HEAD])
def test_layer_decay_is_beits(name: str, options: dict[str, Any], below: dict[str, int]) -> None:
    found = layer_decay(timm.create_model(name, num_classes=3, **options), 0.75)
    groups = {parameter: [g for g in below if f"{parameter}.".startswith(f"{g}.")][-1] for parameter in found}
    assert set(groups.values()) == set(below)
    assert found == pytest.approx({parameter: 0.75 ** below[group] for parameter, group in groups.items()})


def test_layer_decay_differs_from_timms_in_the_final_norm_alone() -> None:
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("test_vit")
    by_name = layer_decay(model, 0.75)
    theirs = {id(p): g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.75) for p in g["params"]}
    differing = {name for name, p in model.named_parameters() if by_name[name] != theirs[id(p)]}
    assert differing == {"norm.weight", "norm.bias"}
    assert {by_name[name] for name in differing} == {1.0}


def test_without_a_head_the_final_norm_ends_the_model() -> None:
    found = layer_decay(timm.create_model("vit_small_patch14_dinov2", num_classes=0, **TINY), 0.5)
    assert (found["norm.weight"], found["blocks.1.norm1.weight"], found["pos_embed"]) == (1.0, 0.5, 0.125)


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
