"""Checkpoints written under the callback, loaded in processes that were just started."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from eva_lightning import EVAInitCallback
from eva_lightning.adapters import find_adapters
from eva_lightning.checkpoint import KEY, NOTICE
from eva_lightning.errors import InputError
from eva_lightning.plain_checkpoint import command_line, write_plain_checkpoint
from tests import fresh_modules as m
from tests.modules import loader
from tests.paths import ROOT

X = next(iter(m.data()))[0]
MODULES: dict[str, pl.LightningModule] = {}


def eva(**options: Any) -> EVAInitCallback:
    return EVAInitCallback(rho=2, r=4, alpha=8.0, verbose=False, **options)


def write(folder: Path, name: str, module: pl.LightningModule, weights_only: bool = False, **options: Any) -> None:
    trainer = m.quiet_trainer(eva(**options))
    trainer.fit(module, m.data())
    trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=weights_only)


def as_of_0_1_0(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1.0 would have written: an instantiator of ours, which Lightning 2.6.6 refuses."""
    old = copy.deepcopy(checkpoint)
    old["state_dict"].pop(NOTICE)
    old[KEY].pop("built_with")
    name, hparams = old.pop("hparams_name", None), old["hyper_parameters"]
    if name not in (None, "kwargs"):
        hparams = {name: hparams}
    cli = "_instantiator" in hparams
    hparams["_instantiator"] = f"eva_lightning.checkpoint.{'instantiate_cli' if cli else 'instantiate'}"
    old["hyper_parameters"] = hparams
    return old


def write_cli(folder: Path, name: str, **options: Any) -> torch.Tensor:
    from lightning.pytorch import cli as cli_module

    model = {"width": 40}
    if options:
        model = {"class_path": "tests.fresh_modules.Plain", "init_args": model}
    trainer = {
        "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
        "callbacks": [{"class_path": "eva_lightning.EVAInitCallback", "init_args": {"r": 4, "verbose": False}}],
    }  # fmt: skip
    base = pl.LightningModule if options else m.Plain
    args = {"model": model, "trainer": trainer}
    cli = cli_module.LightningCLI(base, run=False, save_config_callback=None, args=args, **options)
    cli.trainer.fit(cli.model, m.data())
    cli.trainer.save_checkpoint(folder / f"{name}.ckpt")
    return computed(cli.model)


def computed(module: pl.LightningModule) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(X)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    modules = {
        "plain": m.Plain(40), "weights only": m.Plain(40), "adapter only": m.Plain(40),
        "any keywords": m.AnyKeywords(40, other=3), "dict": m.OneConfig({"width": 40}),
        "namespace": m.OneConfig(Namespace(width=40)), "bare": m.Bare(), "late": m.Late(40), "outer": m.Outer(2),
        "hooked": m.Hooked(40),
    }  # fmt: skip
    for name, module in modules.items():
        adapter_only = {"adapter_only_checkpoints": True} if name == "adapter only" else {}
        write(folder, name, module, weights_only=name == "weights only", **adapter_only)
        assert len({layer.rank for layer in find_adapters(module).values()}) > 1 or name == "late"
    expected = {name: computed(module) for name, module in modules.items()}
    base = m.Plain(40)
    trainer = m.quiet_trainer()
    trainer.fit(base, m.data())
    trainer.save_checkpoint(folder / "base.ckpt")
    expected["base"] = computed(base)
    expected["cli"] = write_cli(folder, "cli")
    expected["cli subclass"] = write_cli(folder, "cli subclass", subclass_mode_model=True)
    for name in ("plain", "dict", "any keywords", "cli", "cli subclass"):
        current = torch.load(folder / f"{name}.ckpt", weights_only=True)
        torch.save(as_of_0_1_0(current), folder / f"old {name}.ckpt".replace("old plain", "old"))
        expected[f"old {name}".replace("old plain", "old")] = expected[name]
    for name, kind in (("plain", m.Plain), ("dict", m.OneConfig)):
        write_plain_checkpoint(kind, folder / f"{name}.ckpt", folder / f"{name} converted.ckpt")
    (folder / "h.yaml").write_text("width: 40\nrate: 0.5\n")
    torch.save((X, expected), folder / "expected.pt")
    return folder


def read(folder: Path, ours: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fresh_reader", str(folder), ours]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found.pop("imported") == (ours == "with")
    return dict(found)


def is_close(outcome: str) -> bool:
    return outcome[0].isdigit() and float(outcome) < 1e-5


@pytest.mark.slow  # a new process imports torch and Lightning
def test_import_eva_lightning_is_all_that_load_from_checkpoint_needs(written: Path) -> None:
    """Checkpoints of version 0.1.0 and of LightningCLI too. A Trainer needs the callback."""
    found = read(written, "with")
    assert len(found) > 25
    assert [f"{name}: {outcome}" for name, outcome in found.items() if not is_close(outcome)] == []


@pytest.mark.slow  # a new process imports torch and Lightning
def test_a_process_that_never_imports_us_loads_what_is_converted_and_is_told_of_the_rest(written: Path) -> None:
    found = read(written, "without")
    fine = {"plain converted", "dict converted", "validate converted", "base"}
    assert {name for name, outcome in found.items() if is_close(outcome)} == fine
    old = {name: found.pop(name) for name in list(found) if name.startswith("old")}
    assert all("not in the allowlist" in outcome or "Missing key" in outcome for outcome in old.values()), old
    for name in found.keys() - fine - {"strict=False"}:
        assert found[name].startswith("RuntimeError"), name
        assert NOTICE in found[name], name


def test_a_module_that_makes_its_own_layers_has_a_notice_where_its_ranks_changed(tmp_path: Path) -> None:
    from tests.eva_lightning.test_checkpoint import WithPeft

    for rho, expected in ((1, False), (2, True)):
        module = WithPeft()
        trainer = m.quiet_trainer(EVAInitCallback(rho=rho, verbose=False))
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "c.ckpt")
        stored = torch.load(tmp_path / "c.ckpt", weights_only=True)
        assert (NOTICE in stored["state_dict"]) == expected
        # the module itself takes its weights back by hand, as after a search for the best epoch
        module.load_state_dict(stored["state_dict"])
        copy.deepcopy(module).load_state_dict(stored["state_dict"])
    with pytest.raises(InputError, match="WithPeft makes LoRA layers itself"):
        write_plain_checkpoint(WithPeft, tmp_path / "c.ckpt", tmp_path / "plain.ckpt")


def test_a_reloaded_module_writes_the_same_description_again(tmp_path: Path) -> None:
    write(tmp_path, "a", m.Plain(40))
    module = m.Plain.load_from_checkpoint(tmp_path / "a.ckpt")
    write(tmp_path, "b", module)  # nothing is streamed again
    a, b = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in "ab")
    assert {k: v for k, v in a[KEY].items() if k != "done"} == {k: v for k, v in b[KEY].items() if k != "done"}
    assert a["state_dict"].keys() == b["state_dict"].keys()


def test_other_modules_load_as_without_us(tmp_path: Path) -> None:
    """Weights that are named like LoRA's, in a module that puts its layers in itself: Lightning decides."""

    class Own(m.Bare):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.layer = torch.nn.ModuleDict({"lora_A": torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)})})

    module = Own()
    module.on_load_checkpoint({})
    trainer = m.quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    loaded = Own.load_from_checkpoint(tmp_path / "own.ckpt")
    assert torch.equal(loaded.layer["lora_A"]["default"].weight, module.layer["lora_A"]["default"].weight)
    assert not {"on_load_checkpoint", "on_save_checkpoint"} & set(vars(loaded))
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        module.load_from_checkpoint(tmp_path / "own.ckpt")


def test_the_command_converts_and_says_what_it_cannot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a", m.Plain(40))
    before = (tmp_path / "a.ckpt").read_bytes()
    source, target = str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")
    assert command_line([source, target, "--module", "tests.fresh_modules:Plain"]) == 0
    stored = torch.load(target, weights_only=True)
    assert KEY not in stored
    assert stored["state_dict"].keys() == m.Plain(40).state_dict().keys()
    assert (tmp_path / "a.ckpt").read_bytes() == before
    (tmp_path / "cut.ckpt").write_bytes(before[:999])
    for args, said in {
        (source, target, "--module", "tests.fresh_modules"): "must be a LightningModule as PACKAGE.MODULE:CLASS",
        (source, target, "--module", "tests.fresh_modules:mlp"): "must be a LightningModule",
        (source, target, "--module", "tests.absent:Plain"): "there is no module 'tests.absent'",
        (source, target, "--module", "tests.fresh_modules:Late"): "it is of another model",
        (str(tmp_path / "no.ckpt"), target, "--module", "tests.fresh_modules:Plain"): "there is no checkpoint",
        (str(tmp_path / "cut.ckpt"), target, "--module", "tests.fresh_modules:Plain"): "is damaged or no checkpoint",
        (target, source, "--module", "tests.fresh_modules:Plain"): "has no adapters of eva_lightning",
    }.items():
        with pytest.raises(SystemExit) as ended:
            command_line(list(args))
        assert ended.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
