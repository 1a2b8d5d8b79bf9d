from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eva_lightning.vision.backbone import timm_models as backbones
from eva_lightning.vision.backbone.backbone_cache import reuse_backbones
from eva_lightning.vision.backbone.timm_models import create_backbone
from eva_lightning.vision.backbone.weights import Weights


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    yield
    reuse_backbones(False)


def build(seed: int, classes: int = 4, weights: Weights | None = None) -> tuple[dict[str, torch.Tensor], float]:
    """A model's weights, and a number drawn after it was built."""
    torch.manual_seed(seed)
    state = create_backbone("test_vit", classes, 32, weights).state_dict()
    return state, torch.rand(1).item()


def test_copies_equal_builds_and_training_one_leaves_the_next_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = {(seed, classes): build(seed, classes) for seed in (0, 1) for classes in (4, 7)}
    builds: list[int] = []
    created = backbones._created
    monkeypatch.setattr(backbones, "_created", lambda *args: (builds.append(1), created(*args))[1])
    reuse_backbones()
    for seed, classes in [(0, 4), (1, 4), (0, 7), (1, 7), (1, 4)]:
        torch.manual_seed(seed)
        model = create_backbone("test_vit", classes, 32)
        state, drawn = expected[seed, classes]
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        # what a run draws next (LoRA's A, dropout) must not depend on how the model came to be
        assert torch.rand(1).item() == drawn
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    assert len(builds) == 3  # for 4 classes, for 7, and for 4 again: one model is kept


def test_random_weights_are_those_of_the_model_and_the_head_those_of_the_seed() -> None:
    (first, _), (second, _) = build(0), build(1)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == ["head.weight"]


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = {name: torch.randn_like(value) for name, value in create_backbone("test_vit", 4, 160).state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    reuse_backbones()
    file = Weights(pretrained=True, file=tmp_path / "w.safetensors", strict=True)
    random, _ = build(0)
    loaded, _ = build(0, weights=file)
    assert torch.equal(loaded["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert not torch.equal(random["blocks.0.attn.qkv.weight"], loaded["blocks.0.attn.qkv.weight"])
