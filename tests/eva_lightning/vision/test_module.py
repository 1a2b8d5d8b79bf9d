from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from eva_lightning.callback import EVAInitCallback
from eva_lightning.vision.module import ImageClassifier


def test_layer_decay_is_a_power_per_layer_counted_from_the_head() -> None:
    module = ImageClassifier("test_vit", num_classes=5, image_size=32, lr=1.0, layer_decay=0.75)
    lr = {id(p): group["lr"] for group in module._parameter_groups() for p in group["params"]}
    assert len(lr) == len(list(module.parameters()))
    model = module.model
    blocks = model.blocks
    depth = len(blocks)  # type: ignore[arg-type]
    assert lr[id(module.get_submodule(module.head_name).weight)] == 1.0
    for index, block in enumerate(blocks):  # type: ignore[arg-type]
        for parameter in block.parameters():
            assert lr[id(parameter)] == pytest.approx(0.75 ** (depth - index))
    assert lr[id(model.norm.weight)] == 1.0  # type: ignore[union-attr, index]
    assert lr[id(model.pos_embed)] == pytest.approx(0.75 ** (depth + 1))
    assert {group["weight_decay"] for group in module._parameter_groups()} == {0.05}


def test_only_the_head_for_linear_probing() -> None:
    module = ImageClassifier("test_vit", num_classes=5, image_size=32)
    module.train_only_head()
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["model.head.weight", "model.head.bias"]


def test_first_loss_is_that_of_guessing() -> None:
    module = ImageClassifier("test_vit", num_classes=7, image_size=32)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    loss = nn.functional.cross_entropy(module(images), labels)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(7.0)).item(), abs=1e-2)


def data(n: int = 20, size: int = 32) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, size, size, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(n) % 5), batch_size=8)


def trainer(**options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", **{**quiet, **options})


def test_logged_means_are_those_of_torchmetrics() -> None:
    module = ImageClassifier("test_vit", num_classes=5, image_size=32, lr=0.0)
    nn.init.normal_(module.get_submodule(module.head_name).weight)  # type: ignore[arg-type]
    loader = data()
    loss, accuracy = MeanMetric(), MulticlassAccuracy(5, average="micro")
    with torch.no_grad():
        for images, labels in loader:  # the last batch is smaller: examples count, not batches
            logits = module.eval()(images)
            loss.update(nn.functional.cross_entropy(logits, labels), len(labels))
            accuracy.update(logits, labels)
    expected = {"loss": float(loss.compute()), "accuracy": float(accuracy.compute())}

    seen: dict[str, float] = {}

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.update({k: float(v) for k, v in trainer.callback_metrics.items()})

    run = trainer(max_epochs=2, callbacks=[Look()])
    run.fit(module.train(), loader, loader)
    # callbacks see them at the end of the epoch, as EpochHistory needs
    for stage in ("train", "val"):
        for kind, value in expected.items():
            assert seen[f"{stage}_{kind}"] == pytest.approx(value, rel=1e-5), (stage, kind)
    (tested,) = run.test(module, loader, verbose=False)
    assert tested == pytest.approx({f"test_{kind}": value for kind, value in expected.items()}, rel=1e-5)


def test_an_interrupted_epoch_leaves_nothing_in_the_next() -> None:
    module = ImageClassifier("test_vit", num_classes=5, image_size=32, lr=0.0)
    first = trainer(max_epochs=1, callbacks=[_Interrupt()])
    with pytest.raises(RuntimeError, match="power cut"):
        first.fit(module, data())
    second = trainer(max_epochs=1)
    second.fit(module, data())
    whole = ImageClassifier("test_vit", num_classes=5, image_size=32, lr=0.0)
    whole.load_state_dict(module.state_dict())
    third = trainer(max_epochs=1)
    third.fit(whole, data())
    assert second.callback_metrics["train_loss"] == third.callback_metrics["train_loss"]


class _Interrupt(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        raise RuntimeError("power cut")


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("split", [False, True])
def test_trains_in_bfloat16(precision: str, split: bool) -> None:
    L.seed_everything(0, verbose=False)
    module = ImageClassifier("test_vit", num_classes=5, image_size=32, lr=5e-3, warmup_epochs=0, split_fused=split)
    callback = EVAInitCallback(r=4, head=module.head_name, verbose=False)
    losses = []

    class Losses(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    trainer(max_epochs=4, precision=precision, callbacks=[callback, Losses()]).fit(module, data())
    assert losses[-1] < losses[0] - 0.1
    expected = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {expected}


def test_means_are_summed_in_fp32_under_bfloat16() -> None:
    """Counted in bfloat16, there are never more than 256 images."""
    seen = {}

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ImageClassifier) -> None:  # type: ignore[override]
            seen.update({name: metric.weight for name, metric in pl_module._means.items() if hasattr(metric, "weight")})

    module = ImageClassifier("test_vit", num_classes=5, image_size=32)
    trainer(max_epochs=1, precision="bf16-true", callbacks=[Look()]).fit(module, data(300))
    assert seen["train_loss"] == torch.tensor(300.0)


def test_logs_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's log() takes about as long as the forward pass of a tiny model."""
    module = ImageClassifier("test_vit", num_classes=5, image_size=32)
    calls = []
    monkeypatch.setattr(module, "log", lambda name, *args, **kwargs: calls.append(name))
    trainer(max_epochs=2).fit(module, data(40))
    assert calls == ["train_loss", "train_accuracy"] * 2


def test_unknown_schedule_suggests() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'cosin': did you mean cosine"):
        ImageClassifier("test_vit", num_classes=5, image_size=32, schedule="cosin")
