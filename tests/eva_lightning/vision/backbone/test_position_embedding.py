from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eva_lightning.vision.backbone.position_embedding import differs_from_timm, resample
from eva_lightning.vision.backbone.timm_models import create_backbone
from eva_lightning.vision.backbone.weights import Weights


def official(pos_embed: Tensor, w: int, h: int, patch: int = 14) -> Tensor:
    """``interpolate_pos_encoding`` of facebookresearch/dinov2, dinov2/models/vision_transformer.py, offset 0.1."""
    n, dim = pos_embed.shape[1] - 1, pos_embed.shape[-1]
    if (w // patch) * (h // patch) == n and w == h:
        return pos_embed
    m = int(math.sqrt(n))
    grid = nn.functional.interpolate(
        pos_embed[:, 1:].reshape(1, m, m, dim).permute(0, 3, 1, 2),
        scale_factor=((w // patch + 0.1) / m, (h // patch + 0.1) / m),
        mode="bicubic",
        antialias=False,
    )
    assert grid.shape[-2:] == (w // patch, h // patch)
    return torch.cat((pos_embed[:, :1], grid.permute(0, 2, 3, 1).view(1, -1, dim)), dim=1)


@pytest.mark.parametrize("size", [98, 224, 336, 504, 518, 700])
def test_resampling_is_the_official_one(size: int) -> None:
    embedding = torch.randn(1, 37 * 37 + 1, 8)
    assert torch.equal(resample(embedding, (size // 14, size // 14)), official(embedding, size, size))


def test_resampling_of_rectangles_dtypes_and_bad_numbers() -> None:
    embedding = torch.randn(1, 37 * 37 + 1, 4)
    assert torch.equal(resample(embedding, (16, 10)), official(embedding, 224, 140))
    assert resample(embedding.bfloat16(), (16, 16)).dtype is torch.bfloat16
    with pytest.raises(ValueError, match="a position embedding of 10 patches is not square"):
        resample(torch.zeros(1, 11, 4), (2, 2))


def test_official_resampling_is_for_dinov2_without_registers() -> None:
    """The official models with registers set offset 0 and antialias (dinov2/hub/backbones.py), as timm does."""
    assert differs_from_timm("vit_giant_patch14_dinov2.lvd142m")
    assert not differs_from_timm("vit_giant_patch14_reg4_dinov2.lvd142m")
    assert not differs_from_timm("vit_small_patch16_dinov3.lvd1689m")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("size", [98, 224])
def test_model_gets_the_official_embedding_by_default_and_timms_where_asked(
    tmp_path: Path, strict: bool, size: int
) -> None:
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **options)
    nn.init.normal_(source.pos_embed)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    weights = Weights(True, tmp_path / "w.safetensors", strict=strict)
    ours = create_backbone("dinov2_s14", 3, size, weights, options=options)
    assert torch.equal(ours.pos_embed, official(source.pos_embed, size, size))  # type: ignore[arg-type]
    theirs = create_backbone("dinov2_s14", 3, size, weights, position_embedding="timm", options=options)
    timms = timm.layers.resample_abs_pos_embed(source.pos_embed, (size // 14, size // 14), num_prefix_tokens=1)
    assert torch.equal(theirs.pos_embed, timms)  # type: ignore[arg-type]
    gap = (ours.pos_embed - theirs.pos_embed).norm() / theirs.pos_embed.norm()  # type: ignore[operator, union-attr]
    assert gap > 0.05


def test_model_of_the_checkpoints_own_size_is_untouched(tmp_path: Path) -> None:
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **options)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = create_backbone("dinov2_s14", 3, 518, Weights(True, tmp_path / "w.safetensors", True), options=options)
    assert torch.equal(model.pos_embed, source.pos_embed)  # type: ignore[arg-type]


def test_weights_from_the_hub_are_resampled_the_official_way_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **options)
    nn.init.normal_(source.pos_embed)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[object, ...]] = []

    def download(*place: object) -> Path:
        asked.append(place)
        return tmp_path / "model.safetensors"

    monkeypatch.setattr("eva_lightning.vision.backbone.timm_models.download", download)
    model = create_backbone("dinov2_s14", 3, 224, Weights(pretrained=True), options=options)
    assert asked == [("timm/vit_small_patch14_dinov2.lvd142m", None)]
    assert torch.equal(model.pos_embed, official(source.pos_embed, 224, 224))  # type: ignore[arg-type]


def test_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match="unknown position embedding 'offical': did you mean official"):
        create_backbone("test_vit", 3, 32, position_embedding="offical")  # type: ignore[arg-type]
