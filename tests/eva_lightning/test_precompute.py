"""The command that computes a state on one process for many."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from eva_lightning import EVAInitCallback, EVAState, StreamingOptions
from eva_lightning.adapters import find_adapters
from eva_lightning.precompute import main
from tests.modules import Classifier, build, dataset, trainer

HERE = "tests.eva_lightning.test_precompute"
OPTIONS = ["--r", "4", "--engine", "exact", "--accelerator", "cpu"]


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(dataset(96), 16)


def make() -> tuple[Classifier, DataLoader[tuple[torch.Tensor, ...]]]:
    return build(), DataLoader(dataset(96), 16)


def make_all() -> tuple[Classifier, Data, EVAInitCallback]:
    return build(), Data(), EVAInitCallback(r=4, target_modules=["3"], verbose=False)


def make_nothing() -> Classifier:
    return build()


def make_done() -> tuple[Classifier, DataLoader[tuple[torch.Tensor, ...]]]:
    module, data = make()
    trainer(EVAInitCallback(r=4, verbose=False)).fit(module, data)
    return module, data


def test_the_same_adapters_as_by_streaming(tmp_path: Path) -> None:
    assert main([f"{HERE}:make", "--output", str(tmp_path / "eva"), *OPTIONS]) == 0
    streamed, given = build(), build()
    how = StreamingOptions(engine="exact")
    trainer(EVAInitCallback(r=4, streaming=how, verbose=False), max_epochs=0).fit(streamed, make()[1])
    trainer(EVAInitCallback(r=4, state=tmp_path / "eva", verbose=False), max_epochs=0).fit(given, make()[1])
    expected, found = find_adapters(streamed), find_adapters(given)
    assert found
    assert {n: x.rank for n, x in found.items()} == {n: x.rank for n, x in expected.items()}
    for name, adapter in found.items():
        assert torch.equal(adapter.a, expected[name].a), name


def test_the_function_may_bring_its_own_callback(tmp_path: Path) -> None:
    assert main([f"{HERE}:make_all", "--output", str(tmp_path / "eva"), "--accelerator", "cpu"]) == 0
    assert set(EVAState.load(tmp_path / "eva").components) == {"net.3"}


def test_a_configuration_of_lightning_cli_for_many_devices(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "trainer: {accelerator: gpu, devices: 8, strategy: fsdp, logger: true,\n"
        "  callbacks: [{class_path: eva_lightning.EVAInitCallback, init_args: {state: not-there-yet}}]}\n"
        f"model: {{class_path: tests.modules.Classifier}}\ndata: {{class_path: {HERE}.Data}}\n"
    )
    assert main(["--config", str(config), "--output", str(tmp_path / "eva"), "--target-modules", "0,3", *OPTIONS]) == 0
    assert set(EVAState.load(tmp_path / "eva").components) == {"net.0", "net.3"}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([], "give either a function"),
        (["make"], "as MODULE:FUNCTION, got 'make'"),
        (["no_such_project:make"], "there is no module 'no_such_project'"),
        ([f"{HERE}:nothing"], "has no function 'nothing'"),
        ([f"{HERE}:make_nothing"], "must return (module, data) or (module, data, callback), got Classifier"),
        ([f"{HERE}:make_done"], "its adapters are initialised already"),
        ([f"{HERE}:make", "--rho", "0.5"], "rho must be"),
        (["--config", "missing.yaml"], "there is no file missing.yaml"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: list[str], sentence: str
) -> None:
    assert main([*source, "--output", str(tmp_path / "eva"), "--accelerator", "cpu"]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_project_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_project.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        main(["broken_project:build", "--output", str(tmp_path / "eva")])
