"""Merged models as timm loads them: the same logits, and the same pixels by timm's own transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from eva_lightning.errors import InputError
from eva_lightning.vision import ImageClassifier, save_timm
from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.data.split_files import Split
from tests.eva_lightning.vision.trained import CLASSES, SIZE, logits_of, timm_model, trained

NAMES = ["ash", "birch", "oak"]


@pytest.fixture(scope="module")
def module() -> ImageClassifier:
    return trained()


def test_timm_loads_the_file_the_folder_and_the_state_dict(module: ImageClassifier, tmp_path: Path) -> None:
    expected, before = logits_of(module), {k: v.clone() for k, v in module.state_dict().items()}
    folder = save_timm(module, tmp_path / "merged", NAMES, about={"data": "noise"})
    file = folder / "model.safetensors"
    bare = timm_model()
    bare.load_state_dict(load_file(file))
    models = {
        "checkpoint_path": timm_model(checkpoint_path=str(file)),
        "folder": timm.create_model(f"local-dir:{folder}", pretrained=True),
        "state_dict": bare,
    }
    for name, model in models.items():
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5, msg=name)
    assert models["folder"].pretrained_cfg["label_names"] == NAMES
    assert "| data | noise |" in (folder / "README.md").read_text()
    # the module itself keeps its adapters
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_timms_transform_gives_the_pixels_that_were_trained_on(module: ImageClassifier, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 41, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    model = timm.create_model(f"local-dir:{save_timm(module, tmp_path / 'm')}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    ours = SplitDataset(Split("test", tmp_path, ("a.png",), (0,)), SIZE)[0][0]
    torch.testing.assert_close(transform(Image.open(tmp_path / "a.png")), ours)


def test_a_network_of_any_image_size_is_built_without_one(tmp_path: Path) -> None:
    module = ImageClassifier("test_resnet", CLASSES, SIZE).eval()
    loaded = timm.create_model(f"local-dir:{save_timm(module, tmp_path / 'm')}", pretrained=True)
    torch.testing.assert_close(logits_of(loaded), logits_of(module))


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(module: ImageClassifier, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class_names must name the 3 classes of the model, got 2 names"):
        save_timm(module, tmp_path / "m", ["a", "b"])
    with pytest.raises(InputError, match="unknown normalization 'none of these'"):
        save_timm(module, tmp_path / "m", normalization="none of these")
    with pytest.raises(InputError, match="fused projections of this model were taken apart"):
        save_timm(ImageClassifier("test_vit", CLASSES, SIZE, split_fused=True), tmp_path / "m")
    assert not (tmp_path / "m").exists()
