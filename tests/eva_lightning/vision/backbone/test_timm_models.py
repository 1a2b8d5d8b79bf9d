from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from eva_lightning.vision.backbone.timm_models import ALIASES, classifier_name, create_backbone, resolve_model
from eva_lightning.vision.backbone.weights import Weights, resolve_weights


def test_aliases_are_timm_models_with_pretrained_weights() -> None:
    assert set(ALIASES) == {"dinov2_s14", "dinov2_b14", "dinov2_l14", "dinov2_g14"}
    for alias, name in ALIASES.items():
        assert resolve_model(alias) == name


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dinov2_b16", "dinov2_b14"),
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("vit_small_patch14_dinov2.lvd142", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_unknown_model_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown .*model '{name}': did you mean .*{near}"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet"])
def test_head_starts_as_in_the_paper(name: str) -> None:
    model = create_backbone(name, num_classes=50, image_size=64)
    head = model.get_submodule(classifier_name(model))
    assert isinstance(head, nn.Linear)
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    assert torch.count_nonzero(head.bias) == 0
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 50)


def test_image_size_must_fit_the_patches() -> None:
    with pytest.raises(ValueError, match=r"multiple of test_vit's patch size 16 \(such as 32 or 48\), got 40"):
        create_backbone("test_vit", 5, image_size=40)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_own_weight_file_is_loaded_and_its_head_replaced(tmp_path: Path, suffix: str) -> None:
    source = timm.create_model("test_vit", num_classes=1000, img_size=160)
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(source.state_dict(), file)
    else:
        save_file(source.state_dict(), file)
    model = create_backbone("test_vit", 7, image_size=160, weights=resolve_weights("test_vit", str(file)))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)  # type: ignore[union-attr, index]
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features = source.eval().forward_head(source.forward_features(x), pre_logits=True)
        found = model.eval().forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(found, features)
    assert model(x).shape == (2, 7)


def test_official_dinov2_file(tmp_path: Path) -> None:
    """The official files hold a mask token, no head, and a position embedding for 518 pixels."""
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    state = {"mask_token": torch.zeros(1, source.embed_dim), **source.state_dict()}
    assert state["pos_embed"].shape == (1, 37 * 37 + 1, 384)
    file = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(state, file)
    model = create_backbone("dinov2_s14", 3, 98, resolve_weights(resolve_model("dinov2_s14"), str(file)))
    assert model.pos_embed.shape == (1, 7 * 7 + 1, 384)  # type: ignore[union-attr]
    assert torch.equal(model.cls_token, source.cls_token)  # type: ignore[arg-type]
    assert torch.equal(model.blocks[11].ls2.gamma, source.blocks[11].ls2.gamma)  # type: ignore[union-attr, index]
    assert model(torch.zeros(1, 3, 98, 98)).shape == (1, 3)


def test_weights_of_another_architecture_name_the_keys(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not of test_vit: it lacks cls_token, .* more; it has the surplus"):
        create_backbone("test_vit", 5, 32, Weights(True, tmp_path / "a.pth", strict=True))
    torch.save(timm.create_model("test_vit2", img_size=32).state_dict(), tmp_path / "b.pth")
    with pytest.raises(
        ValueError, match=r"b\.pth is not of test_vit: it lacks cls_token, .*; it has the surplus reg_token, blocks\."
    ):
        create_backbone("test_vit", 5, 32, Weights(True, tmp_path / "b.pth", strict=True))
    state = timm.create_model("test_vit", img_size=32).state_dict()
    state["norm.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(
        ValueError, match=r"c\.pth is not of test_vit: norm\.weight has shape \[3\] where \[64\] is needed"
    ):
        create_backbone("test_vit", 5, 32, Weights(True, tmp_path / "c.pth", strict=True))


def test_missing_and_unreadable_weight_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weight file .*none\.pth does not exist: download it"):
        resolve_weights("test_vit", str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="is a folder: name the weight file"):
        resolve_weights("test_vit", str(tmp_path))
    (tmp_path / "broken.pth").write_bytes(b"not a weight file")
    with pytest.raises(ValueError, match=r"broken\.pth is damaged .it is no file of torch.save"):
        create_backbone("test_vit", 5, 32, resolve_weights("test_vit", str(tmp_path / "broken.pth")))


def test_hub_that_does_not_answer_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("eva_lightning.vision.backbone.weights.cached_file", lambda *_: None)
    started = time.perf_counter()
    with pytest.raises(ConnectionError, match=r"does not answer .*: pass --weights FILE .* or --weights none"):
        resolve_weights("vit_small_patch14_dinov2.lvd142m", "pretrained")
    assert time.perf_counter() - started < 6


def test_weights_in_the_hub_cache_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = timm.create_model("test_vit", num_classes=1000)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("eva_lightning.vision.backbone.weights.cached_file", lambda *_: tmp_path / "model.safetensors")
    model = create_backbone("test_vit", 5, 32, resolve_weights("test_vit", "pretrained"))
    assert torch.equal(model.cls_token, source.cls_token)  # type: ignore[arg-type]


def test_model_without_pretrained_weights() -> None:
    with pytest.raises(ValueError, match="timm has no pre-trained weights of test_mambaout_none"):
        resolve_weights("test_mambaout_none", "pretrained")
