from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.data.split_files import Split
from eva_lightning.vision.module import ImageClassifier
from experiments.comparisons import transfer_model
from experiments.comparisons.held_out import Evaluations, evaluate
from experiments.comparisons.transfer_model import IMAGE_SIZE, MODEL, Pretraining, pretrain


def dataset(labels: Sequence[int], size: int) -> SplitDataset:
    """Random images."""
    split = Split("some", Path("nowhere"), tuple(map(str, labels)), tuple(labels))
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3, size, size), dtype=np.uint8)
    return SplitDataset(split, size, pixels)


def test_evaluations_are_those_of_scikit_learn() -> None:
    torch.manual_seed(0)
    # class 3 has no image, but is predicted for some: it must not count as wrong in the mean over classes
    data = dataset([0] * 30 + [1] * 15 + [2] * 5, 4)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(48, 4)).train()
    found = evaluate(module, data, batch_size=7)
    assert module.training
    inputs, truth = data.__getitems__(range(50))
    logits = module[2](module[0](inputs)).detach()
    assert 3 in (predicted := logits.argmax(1))
    assert found["loss"] == pytest.approx(log_loss(truth, logits.double().softmax(1), labels=range(4)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted), rel=1e-5)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["class_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted), rel=1e-5)


def test_merging_for_an_evaluation_changes_no_figure_and_no_weight() -> None:
    torch.manual_seed(0)
    module = ImageClassifier(MODEL, 3, IMAGE_SIZE)
    apply_method("dora", module, AdapterOptions(rank=2))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = dataset([0, 1] * 10, IMAGE_SIZE)
    evaluations = Evaluations(data, {1})
    evaluations.on_train_epoch_end(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), module)
    (row,) = evaluations.rows
    assert row == pytest.approx({"epoch": 1, **evaluate(module, data)}, rel=1e-4)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_interrupted_pretraining_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = dataset([0, 1, 2, 3] * 10, transfer_model.CROPPED_FROM), dataset([0, 1, 2, 3], IMAGE_SIZE)
    recipe = Pretraining(epochs=3, batch_size=16)
    whole, cut = (tmp_path / name / "backbone.safetensors" for name in ("whole", "cut"))
    metrics = pretrain(recipe, 4, train, held_out, whole)
    note = Evaluations.on_train_epoch_end

    def power_cut(self: Any, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("power cut")
        note(self, trainer, pl_module)

    monkeypatch.setattr(Evaluations, "on_train_epoch_end", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(recipe, 4, train, held_out, cut)
    assert not cut.exists()
    monkeypatch.setattr(Evaluations, "on_train_epoch_end", note)
    again = pretrain(recipe, 4, train, held_out, cut)
    assert [row["epoch"] for row in again["evaluations"]] == [1, 2, 3]
    assert again["evaluations"] == metrics["evaluations"]
    first, second = load_file(whole), load_file(cut)
    assert "head.weight" not in first
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
    # finished, it is left as it is; another recipe is refused; lost weights are rebuilt
    assert pretrain(recipe, 4, train, held_out, cut) == again
    with pytest.raises(ValueError, match="holds another run"):
        pretrain(Pretraining(epochs=4, batch_size=16), 4, train, held_out, cut)
    cut.unlink()
    pretrain(recipe, 4, train, held_out, cut)
    assert cut.is_file()
