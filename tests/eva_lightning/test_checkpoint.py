"""Resuming and reloading checkpoints with redistributed ranks, into freshly built modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, load_from_checkpoint
from eva_lightning.adapters import find_adapters
from eva_lightning.checkpoint import NOTICE
from tests.modules import Classifier, build, correlated, loader, mlp, trainer

X = correlated(16, seed=9)


class NoStreaming(EVAInitCallback):
    """Fails if anything is streamed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, forward_fn=fail)


def fail(module: nn.Module, batch: Any) -> None:
    raise AssertionError("streamed again after a checkpoint was restored")


class WithPeft(Classifier):
    """Brings its own LoRA layers, uniform r = 4."""

    def __init__(self, use_dora: bool = False) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "3", "5"], use_dora=use_dora)
        super().__init__(get_peft_model(mlp(), config))
        self.save_hyperparameters()


class Plain(Classifier):
    """Knows nothing of adapters; rebuilt from its hyper-parameters."""

    def __init__(self, lr: float = 0.05, width: int = 24) -> None:
        torch.manual_seed(0)
        super().__init__(lr=lr)
        self.save_hyperparameters()


class OneConfig(Classifier):
    """Hyper-parameters under the name of one argument, which Lightning stores in another way."""

    def __init__(self, conf: dict[str, float]) -> None:
        torch.manual_seed(0)
        super().__init__(lr=conf["lr"])
        self.save_hyperparameters("conf")


KINDS: dict[str, Any] = {
    "plain": Plain,
    "peft": WithPeft,
    "peft with DoRA": lambda: WithPeft(use_dora=True),
    "one argument": lambda: OneConfig({"lr": 0.05}),
}


def fitted(kind: str, tmp_path: Path, callback: EVAInitCallback | None = None, **options: Any) -> tuple[Any, Path]:
    module = KINDS[kind]()
    run = trainer(callback or EVAInitCallback(rho=2, r=4), **{"max_epochs": 2, **options})
    run.fit(module, loader())
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    ranks = [layer.rank for layer in find_adapters(module).values()]
    assert len(set(ranks)) > 1, "the ranks differ, or the test shows nothing"
    return module.eval(), path


@pytest.mark.parametrize("kind", KINDS)
def test_load_from_checkpoint_restores_ranks_into_a_fresh_module(kind: str, tmp_path: Path) -> None:
    module, path = fitted(kind, tmp_path)
    loaded = type(module).load_from_checkpoint(path).eval()
    assert torch.equal(loaded(X), module(X))
    for a, b in zip(find_adapters(module).values(), find_adapters(loaded).values(), strict=True):
        assert (a.name, a.rank, a.alpha) == (b.name, b.rank, b.alpha)
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in loaded.named_parameters() if p.requires_grad}
    # and it can go on training without losing what it learned
    trainer(NoStreaming(rho=2, r=4)).fit(loaded, loader())


@pytest.mark.parametrize("kind", KINDS)
def test_validate_restores_ranks_into_a_fresh_module(kind: str, tmp_path: Path) -> None:
    module, path = fitted(kind, tmp_path)
    fresh = KINDS[kind]()
    data = DataLoader(list(zip(X, torch.zeros(16, dtype=torch.long), strict=True)), 16)
    [result] = trainer(NoStreaming(rho=2, r=4)).validate(fresh, data, ckpt_path=str(path))
    expected = nn.functional.cross_entropy(module(X), torch.zeros(16, dtype=torch.long))
    assert result["val"] == pytest.approx(float(expected))


class Halves(Plain):
    """An optimizer with state and a schedule, so that a resume has something to get wrong."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_five_and_five_steps_equal_ten(use_dora: bool, adapter_only: bool, tmp_path: Path) -> None:
    def data() -> Any:
        # 5 batches an epoch, in an order that does not depend on when the run started
        return DataLoader(loader(80).dataset, 16)

    def eva(kind: type[EVAInitCallback] = EVAInitCallback) -> EVAInitCallback:
        return kind(rho=2, r=4, lora={"use_dora": use_dora}, adapter_only_checkpoints=adapter_only)

    whole = Halves()
    trainer(eva(), max_epochs=2).fit(whole, data())
    first = trainer(eva(), max_epochs=1)
    first.fit(Halves(), data())
    path = tmp_path / "half.ckpt"
    first.save_checkpoint(path)
    second = Halves()
    resumed = eva(NoStreaming)
    run = trainer(resumed, max_epochs=2)
    run.fit(second, data(), ckpt_path=str(path))
    assert run.global_step == 10
    assert whole.losses[5:] == second.losses
    for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    states = [t.optimizers[0].state_dict()["state"] for t in (run, _rerun(eva(), data()))]
    for a, b in zip(*(s.values() for s in states), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert resumed.state is not None, "the callback knows its state again"
    assert sum(resumed.state.ranks.values()) == 12
    assert resumed.state.singular_values["net.0"].numel() == 8


def _rerun(callback: EVAInitCallback, data: Any) -> Any:
    run = trainer(callback, max_epochs=2)
    run.fit(Halves(), data)
    return run


def test_adapter_only_checkpoints_leave_the_base_out_and_reload(tmp_path: Path) -> None:
    module, path = fitted("plain", tmp_path, EVAInitCallback(rho=2, r=4, adapter_only_checkpoints=True))
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert not any("base_layer" in k for k in stored)
    assert {k for k in stored if "lora_" not in k} == {
        NOTICE, "net.7.weight", "net.7.bias", "net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked",
    }  # fmt: skip
    assert torch.equal(Plain.load_from_checkpoint(path).eval()(X), module(X))

    class OtherBase(Plain):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.net[0].weight.mul_(1.5)

    with pytest.raises(ValueError, match="other base weights"):
        OtherBase.load_from_checkpoint(path)


def test_weights_only_checkpoint_loads_through_our_function(tmp_path: Path) -> None:
    module = WithPeft()
    run = trainer(EVAInitCallback(rho=2))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    loaded = load_from_checkpoint(WithPeft, tmp_path / "w.ckpt")
    assert type(loaded) is WithPeft
    assert torch.equal(loaded.eval()(X), module.eval()(X))


def test_best_checkpoint_after_fit(tmp_path: Path) -> None:
    module = Plain()
    keep = ModelCheckpoint(tmp_path, monitor="val")
    run = trainer(EVAInitCallback(rho=2, r=4), keep, enable_checkpointing=True, max_epochs=2)
    run.fit(module, loader(), loader())
    a = run.validate(module, loader(), ckpt_path="best")
    assert a[0]["val"] == pytest.approx(float(keep.best_model_score or 0), rel=1e-5)


def test_checkpoint_of_more_layers_than_the_module_has_left(tmp_path: Path) -> None:
    """A module whose layers EVA removed takes a checkpoint that still has them."""
    source = WithPeft()
    run = trainer()
    run.fit(source, loader())
    run.save_checkpoint(tmp_path / "uniform.ckpt")
    target = WithPeft()
    from eva_lightning.adapters.registry import remove

    remove(target, find_adapters(target)["net.3"])
    trainer(NoStreaming(rho=2)).fit(target, loader(), ckpt_path=str(tmp_path / "uniform.ckpt"))
    assert [layer.rank for layer in find_adapters(target).values()] == [4, 4, 4]


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {"target_modules": ["net.3"]}),
        ({}, {"r": 2, "alpha": 3, "exclude": ["net.5"]}),
        ({}, {"use_dora": True}),
        ({"use_dora": True}, {"use_rslora": True}),
    ],
    ids=["fewer layers", "rank and exclusions", "DoRA now", "DoRA then"],
)
def test_a_resumed_run_has_the_adapters_of_its_checkpoint_whatever_is_asked_for_now(
    then: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    first, path = fitted("plain", tmp_path, EVAInitCallback(**{"rho": 2, "r": 4, "verbose": False, **then}))
    resumed, again = Plain(), tmp_path / "again.ckpt"
    run = trainer(NoStreaming(**{"rho": 2, "r": 4, "verbose": False, **now}), max_epochs=3)
    run.fit(resumed, loader(), ckpt_path=path)
    assert run.current_epoch == 3
    trained = {name: p.requires_grad for name, p in first.named_parameters()}
    assert {name: p.requires_grad for name, p in resumed.named_parameters()} == trained
    ranks = {name: (layer.rank, layer.alpha) for name, layer in find_adapters(first).items()}
    assert {name: (layer.rank, layer.alpha) for name, layer in find_adapters(resumed).items()} == ranks
    run.save_checkpoint(again)
    loaded = Plain.load_from_checkpoint(again).eval()
    torch.testing.assert_close(loaded(X), resumed.eval()(X))
    assert not torch.equal(loaded(X), first(X)), "it was trained on"


def test_clear_errors(tmp_path: Path) -> None:
    base = Classifier(mlp())
    run = trainer()
    run.fit(base, loader())
    run.save_checkpoint(tmp_path / "base.ckpt")
    module = Plain()
    with pytest.raises(ValueError, match=r"holds no adapters but Plain has 3 LoRA layers"):
        trainer(EVAInitCallback(r=4)).fit(module, loader(), ckpt_path=str(tmp_path / "base.ckpt"))
    assert not find_adapters(module), "the failed fit left the module as it was"
    assert all(p.requires_grad for p in module.parameters())

    _, path = fitted("plain", tmp_path)

    class Short(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)))

    with pytest.raises(ValueError, match=r"has an adapter on 'net.3'.* Short lacks: it is of another model"):
        Short.load_from_checkpoint(path)


def test_module_is_not_left_watching() -> None:
    module = build()
    trainer(EVAInitCallback(rho=2, r=4)).fit(module, loader())
    assert "on_load_checkpoint" not in vars(module)


@pytest.mark.parametrize("how", ["weights only", "a Trainer without the callback"])
def test_every_checkpoint_of_the_module_describes_its_adapters(how: str, tmp_path: Path) -> None:
    module = Plain()
    run = trainer(EVAInitCallback(rho=2, r=4, alpha=32.0))
    run.fit(module, loader())
    if how != "weights only":
        run = trainer(max_epochs=1)
        run.fit(module, loader())
    run.save_checkpoint(tmp_path / "c.ckpt", weights_only=how == "weights only")
    loaded = Plain.load_from_checkpoint(tmp_path / "c.ckpt")
    assert {layer.module.scaling["default"] for layer in find_adapters(loaded).values()} == {8.0}
    assert torch.equal(loaded.eval()(X), module.eval()(X))


def test_adapter_only_holds_for_weights_only_checkpoints_too(tmp_path: Path) -> None:
    module = Plain()
    run = trainer(EVAInitCallback(rho=2, r=4, adapter_only_checkpoints=True))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "c.ckpt", weights_only=True)
    assert not any("base_layer" in k for k in torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(Plain.load_from_checkpoint(tmp_path / "c.ckpt").eval()(X), module.eval()(X))


def test_checkpoint_without_a_description_is_not_guessed(tmp_path: Path) -> None:
    module = Plain()
    run = trainer(EVAInitCallback(rho=2, r=4, alpha=32.0))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "c.ckpt")
    stripped = torch.load(tmp_path / "c.ckpt", weights_only=True)
    del stripped["eva_lightning"]
    torch.save(stripped, tmp_path / "stripped.ckpt")
    with pytest.raises(ValueError, match="does not say how its adapters were made, and Plain has none"):
        load_from_checkpoint(Plain, tmp_path / "stripped.ckpt")
