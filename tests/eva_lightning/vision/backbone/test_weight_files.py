from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from eva_lightning.errors import InputError
from eva_lightning.vision.backbone.timm_models import create_backbone
from eva_lightning.vision.backbone.weight_files import read_weights
from eva_lightning.vision.backbone.weights import Weights
from eva_lightning.vision.module import ImageClassifier

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 4}


@pytest.mark.parametrize("container", [None, "model", "state_dict", "state_dict_ema"])
def test_containers_and_prefixes_come_off(tmp_path: Path, container: str | None) -> None:
    state = {"module.norm.weight": torch.ones(3), "head.bias": torch.zeros(2)}
    torch.save(state if container is None else {container: state, "epoch": 3}, tmp_path / "a.pth")
    assert set(read_weights(tmp_path / "a.pth")) == {"norm.weight", "head.bias"}


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save({"x": Trap(tmp_path / "ran")}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    message = "besides tensors, which are not built because that would run code" if zipped else "is damaged"
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "is empty: download it again"),
        ("a.pth", b"\n<!DOCTYPE html><html><body>403 Forbidden", "is a web page, not weights"),
        ("a.safetensors", b"<html>", "is a web page, not weights"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer"),
        ("a.pth", b"not a weight file", "is damaged"),
        ("a.safetensors", b"\x00" * 40, "is damaged"),
    ],
)
def test_what_is_no_weight_file_is_said_in_one_sentence(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        create_backbone("test_vit", 5, 32, Weights(True, tmp_path / name, strict=True))
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_truncated_file(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.pth is damaged .*: download it again"):
        read_weights(tmp_path / "a.pth")


def test_other_contents(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list where a mapping of tensors is expected"):
        read_weights(tmp_path / "list.pth")
    torch.save({"epoch": 3, "args": "x"}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"holds no tensors \(found: 'epoch', 'args'\)"):
        read_weights(tmp_path / "none.pth")


def test_lightning_checkpoint_is_told_apart(tmp_path: Path) -> None:
    module = ImageClassifier("test_vit", 4, 32)
    trainer = L.Trainer(max_epochs=0, logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="is a Lightning checkpoint of a whole module"):
        read_weights(tmp_path / "last.ckpt")
    # also where it holds objects that are not built
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
    torch.save({**checkpoint, "x": Trap(tmp_path / "ran")}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is a Lightning checkpoint of a whole module"):
        read_weights(tmp_path / "other.ckpt")


def official_state(registers: bool = False) -> dict[str, Tensor]:
    """Weights under the official names of a DINOv2 with SwiGLU, as its ``torch.hub`` models have them."""
    name = f"vit_giant_patch14_{'reg4_' if registers else ''}dinov2"
    source = timm.create_model(name, num_classes=0, **TINY)
    state = {"mask_token": torch.zeros(1, 48)}
    for key, value in source.state_dict().items():
        state[key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = torch.randn_like(value)
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.randn(1, 37 * 37 + 1, 48)
    return state


@pytest.mark.parametrize("registers", [False, True])
def test_official_dinov2_with_swiglu(tmp_path: Path, registers: bool) -> None:
    state = official_state(registers)
    torch.save(state, tmp_path / "dinov2_vitg14_pretrain.pth")
    name = f"vit_giant_patch14_{'reg4_' if registers else ''}dinov2"
    weights = Weights(True, tmp_path / "dinov2_vitg14_pretrain.pth", strict=True)
    loaded = create_backbone(name, 3, 28, weights, options=TINY).state_dict()
    assert torch.equal(loaded["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.w12.weight"])
    assert torch.equal(loaded["blocks.1.mlp.fc2.bias"], state["blocks.1.mlp.w3.bias"])
    if registers:
        assert torch.equal(loaded["reg_token"], state["register_tokens"])
        # timm adds the embedding to patches only, so that of [CLS] is part of the token
        assert torch.equal(loaded["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
        assert loaded["pos_embed"].shape == (1, 4, 48)
    else:
        assert torch.equal(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
        assert loaded["pos_embed"].shape == (1, 5, 48)


def test_right_keys_of_another_width_name_a_key_and_both_shapes(tmp_path: Path) -> None:
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=12, embed_dim=24, num_heads=2)
    save_file(state.state_dict(), tmp_path / "s.safetensors")
    options = {"embed_dim": 48, "num_heads": 4}
    with pytest.raises(
        ValueError, match=r"s\.safetensors is not of vit_small_patch14_dinov2\.lvd142m: .*where"
    ) as error:
        create_backbone("dinov2_s14", 5, 28, Weights(True, tmp_path / "s.safetensors", strict=True), options=options)
    assert "cls_token has shape [1, 1, 24] where [1, 1, 48] is needed and" in str(error.value)
    assert "\n" not in str(error.value)


def test_deeper_file_names_the_surplus_keys(tmp_path: Path) -> None:
    deep = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=3, embed_dim=24, num_heads=2)
    torch.save({"mask_token": torch.zeros(1, 24), **deep.state_dict()}, tmp_path / "d.pth")
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    with pytest.raises(ValueError, match=r"it has the surplus blocks\.2\..* more"):
        create_backbone("dinov2_s14", 5, 28, Weights(True, tmp_path / "d.pth", strict=True), options=options)


def test_another_patch_size_is_refused_instead_of_resampled(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_base_patch32_224", num_classes=0, **TINY).state_dict(), tmp_path / "p32.pth")
    with pytest.raises(ValueError, match=r"proj.weight has shape \[48, 3, 32, 32\] where \[48, 3, 16, 16\]"):
        create_backbone("vit_base_patch16_224", 5, 64, Weights(True, tmp_path / "p32.pth", strict=True), options=TINY)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} must be a file, and is no ordinary file"):
        read_weights(tmp_path / name)  # opening it would wait for a writer
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=rf"{name} must be a file, and is no ordinary file"):
        read_weights(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name} must be a file, and is a folder"):
        read_weights(tmp_path / name)
