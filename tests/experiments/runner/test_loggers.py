from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from experiments.runner import loggers
from experiments.runner.loggers import check_loggers, open_loggers, parse_loggers
from experiments.vtab import settings as run
from tests.eva_lightning.vision.fakes import make_task


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where nobody has logged in to wandb, whatever this one has."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    yield
    wandb.teardown()  # which keeps for the process what it read from these


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", ()),
        ("csv", ("csv",)),
        (" tensorboard, csv ,", ("tensorboard", "csv")),
        (("tensorboard", "csv"), ("tensorboard", "csv")),
        ("csv,csv,wandb", ("csv", "wandb")),
    ],
)
def test_a_list_with_commas(text: str | tuple[str, ...], names: tuple[str, ...]) -> None:
    assert parse_loggers(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wand", "unknown logger 'wand': did you mean wandb"),
        ("csv,tensorbord", "unknown logger 'tensorbord': did you mean tensorboard"),
        (",", "logger must be one or more of none, csv, tensorboard, wandb, wandb-offline, got ','"),
        ("none,csv", "logger none cannot be combined with others, got 'none,csv'"),
        ("wandb-offline,wandb", "logger wandb cannot be combined with wandb-offline"),
    ],
)
def test_bad_names_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_loggers(text)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logger tensorboard needs .* not installed: pip install tensorboard"):
        check_loggers(["csv", "tensorboard"])
    with pytest.raises(ValueError, match=r"logger wandb-offline needs .* not installed: pip install wandb"):
        check_loggers(["wandb-offline"])
    check_loggers(["csv"])


@pytest.mark.usefixtures("no_account")
def test_wandb_without_an_account_is_said_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_data(*args: object) -> None:
        raise AssertionError("the data were looked at")

    monkeypatch.setattr("experiments.vtab.single_run.open_task", no_data)
    assert run.command_line(f"--root x --task kitti --output {tmp_path / 'runs'} --logger wandb".split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: logger wandb has no API key: call `wandb login`")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")  # the user's own way to say it
    check_loggers(["wandb"])


def test_an_unreachable_server_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def down(**kwargs: Any) -> None:
        raise wandb.errors.CommError("Run initialization has timed out\n after 90.0 sec")

    monkeypatch.setattr(loggers, "_has_wandb_account", lambda: True)
    monkeypatch.setattr(wandb, "init", down)
    with pytest.raises(ConnectionError, match=r"could not start a run \(Run initialization has timed out after 90"):
        open_loggers(["csv", "wandb"], tmp_path, "run", {}).__enter__()


@pytest.mark.usefixtures("no_account")
def test_a_run_leaves_its_curves_in_every_logger(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing import event_accumulator as reading

    make_task(tmp_path / "data")
    arguments = (
        f"--root {tmp_path / 'data'} --task kitti --model test_vit --weights none --image-size 32 --batch-size 8 "
        f"--rank 4 --epochs 2 --accelerator cpu --output {tmp_path} --name run --split train800 "
        "--logger wandb-offline,tensorboard,csv"
    ).split()
    metrics = run.main(arguments)
    folder = tmp_path / "run"
    captured = capfd.readouterr()
    assert "wandb:" not in captured.out + captured.err
    assert "WANDB_MODE" not in os.environ

    (file,) = folder.glob("csv/*/metrics.csv")
    with file.open() as handle:
        rows = list(csv.DictReader(handle))
    seen = {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}
    with (folder / "metrics.csv").open() as handle:
        history = list(csv.DictReader(handle))
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"):
        assert seen[key] == pytest.approx([float(row[key]) for row in history]), key
    assert len(seen["epoch_seconds"]) == 2
    assert seen["test_accuracy"] == pytest.approx([metrics["accuracy"]])
    assert seen["trainable_parameters"] == [metrics["trainable_parameters"]]
    ranks = list(metrics["ranks"].values())
    assert seen["eva/rank_mean"] == [4.0]
    assert (seen["eva/rank_max"], seen["eva/rank_min"]) == ([max(ranks)], [min(ranks)])
    assert seen["eva/seconds"] == pytest.approx([metrics["init_seconds"]])
    settings = yaml.safe_load((file.parent / "hparams.yaml").read_text())
    assert (settings["method"], settings["rho"], settings["rank"]) == ("eva", 2.0, 4)

    events = reading.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("val_loss")] == pytest.approx(seen["val_loss"])
    assert [e.value for e in events.Scalars("hp/test_accuracy")] == pytest.approx([metrics["accuracy"]])

    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    wanted = (b"val_accuracy", b"test_accuracy", b"eva/rank_mean", b"weight_decay", b"kitti-test_vit-eva-r4")
    # wandb's own process closes the file, on a busy machine after finish() has returned
    deadline = time.monotonic() + 60
    while (missing := [key for key in wanted if key not in record.read_bytes()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing

    # finished is finished, whatever the logger; begun anew, it has no curves of before
    assert run.main([*arguments[:-1], "none"]) == metrics
    run.main([*arguments[:-1], "none", "--overwrite"])
    assert not any((folder / name).exists() for name in ("csv", "tensorboard", "wandb"))


def test_merged_evaluation_is_logged_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator as reading

    make_task(tmp_path / "data")
    metrics = run.main(
        f"--root {tmp_path / 'data'} --task kitti --model test_vit --weights none --image-size 32 --batch-size 8 "
        f"--rank 2 --epochs 1 --warmup-epochs 0 --accelerator cpu --output {tmp_path} --name run --method lora "
        "--protocol authors-code --logger tensorboard".split()
    )
    events = reading.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for key in ("test_accuracy", "hp/test_accuracy"):
        assert [e.value for e in events.Scalars(key)] == pytest.approx([metrics["accuracy"]])


def test_a_resumed_run_continues_and_another_run_is_another(tmp_path: Path) -> None:
    for start in range(2):
        with open_loggers(["csv"], tmp_path / "a", "a", {"lr": 1}) as (logger,):
            logger.log_metrics({"x": start}, step=start)
    assert [(tmp_path / f"a/csv/version_{n}/metrics.csv").read_text() for n in (0, 1)] == [
        "step,x\n0,0\n", "step,x\n1,1\n",
    ]  # fmt: skip

    def run_id(name: str) -> str:
        with open_loggers(["wandb-offline"], tmp_path / name, name, {}) as (logger,):
            return str(logger.experiment.id)

    first = run_id("a")
    assert run_id("b") != first
    assert run_id("a") == first


def test_an_exception_marks_wandbs_run_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    codes: list[int] = []
    finish = wandb.Run.finish

    def noted(self: Any, exit_code: int | None = None, quiet: bool | None = None) -> None:
        codes.append(-1 if exit_code is None else exit_code)
        finish(self, exit_code)

    monkeypatch.setattr(wandb.Run, "finish", noted)
    with open_loggers(["wandb-offline"], tmp_path / "good", "good", {}):
        pass
    with pytest.raises(RuntimeError), open_loggers(["wandb-offline"], tmp_path / "bad", "bad", {}):
        raise RuntimeError
    assert codes == [0, 1]
    assert wandb.run is None
