from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from eva_lightning.callback import EVAInitCallback
from eva_lightning.vision.history import EpochHistory
from eva_lightning.vision.methods import METHODS, AdapterOptions, apply_method
from eva_lightning.vision.module import ImageClassifier
from eva_lightning.vision.vtab import VTAB1K
from tests.vision.fakes import make_task


def build(method: str, options: AdapterOptions) -> tuple[ImageClassifier, list[L.Callback]]:
    L.seed_everything(0, verbose=False)
    module = ImageClassifier("test_vit", num_classes=4, image_size=32, lr=1e-2, warmup_epochs=1)
    return module, apply_method(method, module, options)


def fit(module: ImageClassifier, callbacks: list[L.Callback], data: VTAB1K, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = L.Trainer(accelerator="cpu", callbacks=callbacks, enable_checkpointing=False, **quiet, **options)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture
def data(tmp_path: Path) -> VTAB1K:
    make_task(tmp_path / "data")
    return VTAB1K(tmp_path / "data", "kitti", image_size=32, batch_size=8, progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_trains_what_the_method_trains_and_nothing_else(method: str, data: VTAB1K) -> None:
    module, callbacks = build(method, AdapterOptions(rank=4))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(module, callbacks, data, max_epochs=2)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    kinds = {
        "head" if ".head." in n else "lora" if "lora_" in n else "bias" if n.endswith("bias") else "rest"
        for n in trained
    }
    adapters = {"head", "lora", "bias"}
    assert kinds == {"linear": {"head"}, "fft": {"head", "bias", "rest"}}.get(method, adapters)
    for name, parameter in module.named_parameters():
        old = before.get(name, before.get(name.replace(".base_layer", "")))
        if old is not None and name not in trained and old.shape == parameter.shape:
            assert torch.equal(parameter, old), name
    assert ("lora_magnitude_vector" in " ".join(trained)) == ("dora" in method)


@pytest.mark.parametrize("method", ["lora", "eva"])
def test_adapters_start_from_the_pretrained_function(method: str, data: VTAB1K) -> None:
    module, callbacks = build(method, AdapterOptions(rank=4))
    L.seed_everything(0, verbose=False)
    plain = ImageClassifier("test_vit", num_classes=4, image_size=32)
    module.lr = 0.0
    module.weight_decay = 0.0
    fit(module, callbacks, data, max_epochs=1)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(module.eval()(images), plain.eval()(images), rtol=0, atol=1e-6)


def test_eva_keeps_the_rank_budget_and_alpha_over_r(data: VTAB1K) -> None:
    module, callbacks = build("eva", AdapterOptions(rank=4, rho=2.0))
    fit(module, callbacks, data, max_epochs=1)
    (callback,) = callbacks
    assert isinstance(callback, EVAInitCallback)
    assert callback.state is not None
    assert len(callback.state.ranks) == 4 * len(module.model.blocks)  # type: ignore[arg-type]
    assert sum(callback.state.ranks.values()) == 4 * len(callback.state.ranks)
    assert "model.head" not in callback.state.ranks
    scalings = {m.scaling["default"] for m in module.modules() if hasattr(m, "lora_A")}
    assert scalings == {0.25}


@pytest.mark.parametrize("method", ["fft", "lora", "eva", "eva-dora"])
def test_interrupted_and_resumed_equals_uninterrupted(method: str, data: VTAB1K, tmp_path: Path) -> None:
    options = AdapterOptions(rank=4)
    whole, callbacks = build(method, options)
    history = EpochHistory()
    fit(whole, [*callbacks, history], data, max_epochs=4)

    class Interrupt(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            if trainer.current_epoch == 1:
                raise RuntimeError("power cut")

    first, callbacks = build(method, options)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(first, [*callbacks, EpochHistory(), Interrupt()], data, max_epochs=4)
    second, callbacks = build(method, options)
    resumed = EpochHistory(tmp_path / "metrics.csv")
    trainer = L.Trainer(
        accelerator="cpu", callbacks=[*callbacks, resumed], logger=False, enable_progress_bar=False, max_epochs=4,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(second, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [row["train_loss"] for row in resumed.rows] == [row["train_loss"] for row in history.rows]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5


def test_plain_lora_checkpoints_leave_frozen_weights_out(data: VTAB1K, tmp_path: Path) -> None:
    module, callbacks = build("lora", AdapterOptions(rank=4))
    trainer = fit(module, callbacks, data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"].keys()
    assert any("lora_A" in key for key in keys)
    assert not any(key.endswith("base_layer.weight") for key in keys)


def test_unknown_method_suggests(data: VTAB1K) -> None:
    module = ImageClassifier("test_vit", num_classes=4, image_size=32)
    with pytest.raises(ValueError, match="unknown method 'eva-dra': did you mean eva-dora"):
        apply_method("eva-dra", module, AdapterOptions())


@pytest.mark.parametrize(
    ("option", "value"), [("rank", 0), ("rho", 0.5), ("rho", float("nan")), ("tau", 0.0), ("metric", "ratios")]
)
def test_bad_options_are_named(option: str, value: object) -> None:
    with pytest.raises(ValueError, match="r must be" if option == "rank" else option):
        AdapterOptions(**{option: value})  # type: ignore[arg-type]
