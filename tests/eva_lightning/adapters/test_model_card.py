"""What save_pretrained writes for the hub: the base model's name, and a card that says what EVA did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from torch import nn

from eva_lightning.adapters import find_adapters, inject, save_pretrained
from eva_lightning.errors import InputError
from tests.eva_lightning.vision.trained import trained


def rows(card: str) -> dict[str, str]:
    lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and "---" not in line]
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def test_the_card_of_a_trained_model_names_method_rho_r_ranks_and_data(tmp_path: Path) -> None:
    module = trained()
    about = {"data": "12 images | of `noise`", "accuracy": 0.5, "nothing": None, "classes": ["a", "b"]}
    folder = save_pretrained(module.model, tmp_path, base_model="timm/test_vit.r160_in1k", about=about)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "timm/test_vit.r160_in1k"
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "base_model": "timm/test_vit.r160_in1k", "library_name": "peft", "tags": ["eva", "lora", "peft", "timm"],
    }  # fmt: skip
    ranks = [layer.rank for layer in find_adapters(module).values()]
    found = rows(card)
    assert (found["method"], found["ρ"], found["r"]) == ("EVA (LoRA)", "2", "4")
    assert found["ranks"] == f"{min(ranks)} to {max(ranks)} in {len(ranks)} layers, sum {sum(ranks)}"
    assert max(ranks) > min(ranks)
    assert found["data"] == r"12 images \| of \`noise\`"
    assert (found["accuracy"], found["classes"], "nothing" in found) == ("0.5", "a, b", False)
    line = 'base = timm.create_model("test_vit.r160_in1k", pretrained=True, num_classes=3, img_size=32)'
    assert line in card.splitlines()


def adapted() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    inject(net, r=2)
    return net


def test_plain_lora_claims_no_eva_and_other_bases_no_timm(tmp_path: Path) -> None:
    card = (save_pretrained(adapted(), tmp_path, base_model="me/net") / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["lora", "peft"]
    assert rows(card)["method"] == "LoRA"
    assert "ρ" not in card
    assert "timm" not in card


@pytest.mark.parametrize("name", ["/models/net", "./models/net", "~/net"], ids=["root", "here", "home"])
def test_a_folder_is_no_base_model_of_the_hub(name: str, tmp_path: Path) -> None:
    card = (save_pretrained(adapted(), tmp_path, base_model=name) / "README.md").read_text()
    assert "base_model" not in yaml.safe_load(card.split("---")[1]), "the hub refuses such a card"
    assert f"# Adapters for {name}" in card


def test_an_edited_card_stays_and_without_a_base_model_there_is_none(tmp_path: Path) -> None:
    net = adapted()
    assert not (save_pretrained(net, tmp_path / "plain") / "README.md").exists()
    folder = save_pretrained(net, tmp_path / "a", base_model="me/net")
    first = (folder / "README.md").read_text()
    save_pretrained(net, folder, base_model="me/other")
    assert (folder / "README.md").read_text() == first.replace("me/net", "me/other")
    (folder / "README.md").write_text("# Mine\n")
    save_pretrained(net, folder, base_model="me/net")
    assert (folder / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x00b", 3], ids=["empty", "space", "line", "zero", "number"])
def test_what_cannot_name_a_base_model_is_refused_before_anything_is_written(name: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base_model must name what the adapters were trained on"):
        save_pretrained(adapted(), tmp_path / "a", base_model=name)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="about is for the model card"):
        save_pretrained(adapted(), tmp_path / "a", about={"data": "x"})
    assert not (tmp_path / "a").exists()
