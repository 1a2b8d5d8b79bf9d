"""Uploads to the Hugging Face hub, against a stand-in on this machine, and what comes back from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel

from eva_lightning.adapters import save_pretrained
from eva_lightning.errors import InputError, MissingInputError, UnreachableError
from eva_lightning.hub import push_to_hub
from eva_lightning.vision import ImageClassifier, save_timm
from tests.eva_lightning.vision.trained import base, logits_of, trained
from tests.hub_stand_in import hub


@pytest.fixture(scope="module")
def module() -> ImageClassifier:
    return trained()


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with hub(tmp_path / "hub", monkeypatch) as address:
        yield address


def test_an_adapter_comes_back_from_the_hub_with_the_same_logits(
    module: ImageClassifier, address: str, tmp_path: Path
) -> None:
    folder = save_pretrained(module.model, tmp_path / "adapter", base_model="timm/test_vit.r160_in1k")
    (folder / "private.txt").write_text("stays here")
    assert push_to_hub(folder, "me/birds") == f"{address}/me/birds"
    assert sorted(file.name for file in (tmp_path / "hub/me/birds").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert PeftConfig.from_pretrained("me/birds").base_model_name_or_path == "timm/test_vit.r160_in1k"
    loaded = PeftModel.from_pretrained(base(), "me/birds")
    torch.testing.assert_close(logits_of(loaded), logits_of(module), rtol=1e-5, atol=1e-5)
    card = ModelCard.load("me/birds")
    assert 'PeftModel.from_pretrained(base, "me/birds")' in card.text
    assert "me/birds" not in (folder / "README.md").read_text()
    assert (card.data.base_model, card.data.library_name) == ("timm/test_vit.r160_in1k", "peft")
    assert set(card.data.tags or ()) >= {"eva", "lora"}


def test_a_merged_model_comes_back_by_timm(module: ImageClassifier, address: str, tmp_path: Path) -> None:
    push_to_hub(save_timm(module, tmp_path / "merged", ["ash", "birch", "oak"]), "me/trees", private=True)
    loaded = timm.create_model("hf-hub:me/trees", pretrained=True)
    torch.testing.assert_close(logits_of(loaded), logits_of(module), rtol=1e-5, atol=1e-5)
    assert loaded.pretrained_cfg["label_names"] == ["ash", "birch", "oak"]


def test_what_cannot_be_uploaded_is_one_sentence(
    module: ImageClassifier, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingInputError, match=r"empty has no config\.json: write the folder by"):
        push_to_hub(tmp_path / "empty", "me/birds")
    folder = save_pretrained(module.model, tmp_path / "plain")
    with pytest.raises(MissingInputError, match=r"plain has no README\.md: .*base_model"):
        push_to_hub(folder, "me/birds")
    folder = save_pretrained(module.model, tmp_path / "adapter", base_model="timm/test_vit")
    with pytest.raises(InputError, match="repo_id must be owner/name"):
        push_to_hub(folder, "me/birds/and more")
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n# Mine\n")
    with pytest.raises(InputError, match=r"cannot be uploaded .*README.md. - library_name is missing$"):
        push_to_hub(folder, "me/birds")
    with pytest.raises(InputError, match=r"^token has characters that no token has, .* end of a line$"):
        push_to_hub(folder, "me/birds", token="hf_test\n")
    with pytest.raises(InputError, match=r"refuses me/birds: .*401.*token that may write"):
        push_to_hub(folder, "me/birds", token="hf_another")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"hub does not answer .*adapter stays as it is"):
        push_to_hub(folder, "me/birds")
