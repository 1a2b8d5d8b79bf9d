"""``pytorch_lightning``, the copy of Lightning under its old name, works like ``lightning.pytorch``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.methods.data_driven import DataDrivenStart
from eva_lightning.namespaces import is_overridden, lightning_classes, namespace_of
from tests.fresh_modules import data, mlp

COPIES = [lightning.pytorch, pytorch_lightning]


def module_of(copy: ModuleType) -> Any:
    class Module(copy.LightningModule):  # type: ignore[misc, name-defined]
        """Has no forward: the callback runs training_step."""

        def __init__(self, width: int = 24) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = mlp(width)

        def setup(self, stage: str) -> None:
            """Makes the callback wait for what a module may build here."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        validation_step = training_step

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)

    return Module


def trainer(copy: ModuleType, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return copy.Trainer(callbacks=list(callbacks), **options)


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_fit_resume_validate_and_load_in_either(copy: ModuleType, tmp_path: Path) -> None:
    kind, path = module_of(copy), str(tmp_path / "a.ckpt")
    module, fitted = kind(40), EVAInitCallback(rho=2, r=4, verbose=False)
    callbacks = import_module(f"{copy.__name__}.callbacks")
    averages = [callbacks.WeightAveraging()] if hasattr(callbacks, "WeightAveraging") else []  # since Lightning 2.6
    run = trainer(copy, *averages, fitted)
    run.fit(module, data())
    assert fitted.state is not None
    assert len({layer.rank for layer in find_adapters(module).values()}) > 1
    run.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    for fresh in (kind.load_from_checkpoint(path), kind(40)):
        callback = EVAInitCallback(rho=2, r=4, verbose=False)
        trainer(copy, callback).validate(fresh, data(), ckpt_path=path)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.state_dict().items())
    resumed = kind(40)
    trainer(copy, EVAInitCallback(rho=2, r=4, verbose=False), max_epochs=2).fit(resumed, data(), ckpt_path=path)
    assert find_adapters(resumed).keys() == find_adapters(module).keys()


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_our_callbacks_are_callbacks_of_either(copy: ModuleType) -> None:
    for callback in (EVAInitCallback(), DataDrivenStart("corda")):
        assert isinstance(callback, copy.Callback)
        assert callback in copy.Trainer(callbacks=callback, logger=False, enable_checkpointing=False).callbacks


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_sharding_strategies_of_either_are_refused(copy: ModuleType) -> None:
    strategy = import_module(f"{copy.__name__}.strategies").FSDPStrategy()
    run = trainer(copy)
    run._accelerator_connector.strategy = strategy  # put in, as a Trainer on the CPU refuses it
    with pytest.raises(ValueError, match="FSDPStrategy shards the model before EVA can run it"):
        EVAInitCallback(r=4).setup(run, module_of(copy)(), "fit")
    with pytest.raises(ValueError, match="which FSDPStrategy shards"):
        DataDrivenStart("corda").setup(run, module_of(copy)(), "fit")


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_cli_of_either(copy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["main.py"])
    cli_module = import_module(f"{copy.__name__}.cli")
    callback = {"class_path": "eva_lightning.EVAInitCallback", "init_args": {"r": 4, "verbose": False}}
    options = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "callbacks": [callback],
    }  # fmt: skip
    args = {"model": {"width": 40}, "trainer": options}
    kind = module_of(copy)
    cli = cli_module.LightningCLI(kind, run=False, save_config_callback=None, args=args)
    cli.trainer.fit(cli.model, data())
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "a.ckpt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in cli.model.state_dict().items())


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
def test_one_of_the_other_is_refused_by_lightning(copy: ModuleType) -> None:
    [other] = [other for other in COPIES if other is not copy]
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        trainer(other, EVAInitCallback(r=4)).fit(module_of(copy)(), data())


def test_classes_are_told_apart() -> None:
    ours, other = module_of(lightning.pytorch), module_of(pytorch_lightning)
    assert [namespace_of(kind) for kind in (ours, other, int)] == ["lightning.pytorch", "pytorch_lightning", None]
    assert lightning_classes("core.module", "LightningModule") == tuple(copy.LightningModule for copy in COPIES)
    assert lightning_classes("core.module", "Absent") == ()
    assert is_overridden("setup", other())
    assert not is_overridden("configure_model", other())
    with pytest.raises(TypeError, match=r"of lightning.pytorch or pytorch_lightning, got Linear of torch"):
        is_overridden("setup", nn.Linear(1, 1))
