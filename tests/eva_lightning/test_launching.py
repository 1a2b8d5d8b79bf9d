"""Strategies that start processes: the parent's module holds what the children trained, as without the callback."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.errors import EVAWarning
from tests.modules import CLASSES, IN, Classifier, build, correlated, dataset, mlp, trainer

pytestmark = pytest.mark.distributed


class AtTheEnd(pl.Callback):
    """Writes down what the first child has after the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 0:
            scaling = {n: x.module.scaling[x.adapter] for n, x in find_adapters(pl_module).items()}
            torch.save({"weights": pl_module.state_dict(), "scaling": scaling}, self.path)


def data() -> Any:
    return DataLoader(dataset(96), 8)


def check(module: Any, callback: EVAInitCallback, child: Any) -> None:
    weights = module.state_dict()
    assert set(weights) == set(child["weights"])
    assert all(torch.equal(value, weights[name]) for name, value in child["weights"].items())
    layers = find_adapters(module)
    assert {n: x.module.scaling[x.adapter] for n, x in layers.items()} == child["scaling"]
    assert any(x.b.any() for x in layers.values())
    assert callback.state is not None
    assert {n: x.rank for n, x in layers.items()} == {n: r for n, r in callback.state.ranks.items() if r}
    assert len(set(callback.state.ranks.values())) > 1
    assert "load_state_dict" not in vars(module)


@pytest.mark.parametrize(
    ("strategy", "peft", "options"),
    [
        ("ddp_fork", False, {}),
        ("ddp_notebook_find_unused_parameters_true", True, {"rescale_alpha": False}),
        pytest.param("ddp_notebook", False, {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param(
            DDPStrategy(start_method="spawn", process_group_backend="gloo"), False, {}, marks=pytest.mark.slow
        ),
        pytest.param(DDPStrategy(start_method="forkserver"), True, {}, marks=pytest.mark.slow),
    ],
    ids=["fork", "notebook-peft", "notebook-dora", "spawn", "forkserver-peft"],
)
def test_the_parent_has_ranks_weights_and_state(strategy: Any, peft: bool, options: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "3", "5"], modules_to_save=["7"])
    module: Any = Classifier(get_peft_model(mlp(), config)) if peft else Classifier()
    callback = EVAInitCallback(rho=2, r=4, verbose=False, **options)
    run = trainer(callback, AtTheEnd(tmp_path / "child.pt"), strategy=strategy, devices=2)
    run.fit(module, data())
    check(module, callback, torch.load(tmp_path / "child.pt"))
    trainable = [n for n, p in module.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "7" in n.split(".") for n in trainable)

    before = callback.state
    trainer(callback, max_epochs=0).fit(module, data())
    assert callback.state is before, "a second fit keeps them"
    run.save_checkpoint(tmp_path / "c.ckpt")
    if not peft:
        x = correlated(8)
        assert torch.equal(Classifier.load_from_checkpoint(tmp_path / "c.ckpt").eval()(x), module.eval()(x))


def test_a_child_that_fails_leaves_the_parent_as_it_was() -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            raise RuntimeError("broken")

    module = Failing()
    with pytest.raises(Exception, match="broken"):
        trainer(EVAInitCallback(r=4, verbose=False), strategy="ddp_fork", devices=2).fit(module, data())
    assert "load_state_dict" not in vars(module)
    assert not find_adapters(module)


def test_layers_that_only_the_children_made_are_said() -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            super().__init__(net=nn.Identity())

        def setup(self, stage: str) -> None:
            self.net = mlp()

    with pytest.warns(EVAWarning, match="the module in this process does not have the trained adapters"):
        trainer(EVAInitCallback(r=4, verbose=False), strategy="ddp_fork", devices=2).fit(Late(), data())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(IN, 8), nn.Linear(IN, 8), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(x) + nn.functional.linear(x, self.b.weight))


def test_ddp_with_a_weight_that_is_read_instead_of_called() -> None:
    callback, module = EVAInitCallback(rho=1, r=4, verbose=False), Classifier(Branches())
    # without the removal Lightning ends with "parameters that were not used in producing the loss"
    trainer(callback, strategy="ddp_fork", devices=2, max_epochs=2).fit(module, data())
    assert callback.state is not None
    assert callback.state.ranks == {"net.a": 4, "net.b": 0}
    assert type(module.net.b) is nn.Linear


def test_the_users_own_idle_adapters_are_named_before_lightnings_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message, file=sys.stderr, flush=True))
    net = get_peft_model(Branches(), LoraConfig(r=2, target_modules=["a", "b"], modules_to_save=["head"]))
    with pytest.raises(Exception, match="not used in producing the loss"):
        trainer(EVAInitCallback(verbose=False), strategy="ddp_fork", devices=2, max_epochs=2).fit(
            Classifier(net), data()
        )
    text = capfd.readouterr().err
    assert "1 of 2 adapted layers ('net.b') did not run" in text
    assert "DDP will stop where they get no gradient" in text


def test_lightning_still_has_what_is_replaced() -> None:
    """The private names that eva_lightning.launching relies on."""
    launch = _MultiProcessingLauncher.launch
    assert launch.__name__ == "launch"
    assert launch.__wrapped__.__module__ == _MultiProcessingLauncher.__module__  # type: ignore[attr-defined]
    assert build().load_state_dict.__self__ is not None
