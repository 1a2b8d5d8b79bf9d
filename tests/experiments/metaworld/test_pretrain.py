from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.rl.tasks import MT40
from eva_lightning.sealed import read_sealed_json
from experiments.metaworld.pretrain import Settings, command_line, main, parse
from tests.eva_lightning.rl.synthetic import write_synthetic
from tests.paths import ROOT

CONFIGS = ROOT / "configs" / "metaworld"
TASKS = "drawer-open-v3,reach-v3"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_synthetic(tmp_path / "data", TASKS.split(","), episodes=6)
    text = (
        f"--tasks {TASKS} --data {tmp_path / 'data'} --width 16 --layers 1 --heads 2 --context 4 --batch-size 8 "
        f"--max-steps 8 --val-every 4 --checkpoint-every 2 --lr 1e-2 --val-episodes 1 --accelerator cpu "
        f"--output {tmp_path / 'runs'} --name run --progress false"
    )
    return text.split()


def test_defaults_and_configs_are_the_papers_and_the_small_recipe() -> None:
    paper: dict[str, Any] = {
        "width": 512, "layers": 4, "heads": 8, "context": 50, "dropout": 0.2, "batch_size": 128, "max_steps": 1_000_000,
        "lr": 1e-4, "min_lr": 1e-6, "warmup_steps": 4000, "weight_decay": 0.01, "gradient_clip": 0.25, "tasks": MT40,
    }  # fmt: skip
    for settings in (Settings(), parse(["--config", str(CONFIGS / "pretrain_paper.yaml")])):
        assert {key: getattr(settings, key) for key in paper} == paper
    small = parse(["--tasks", "mt40", "--config", str(CONFIGS / "pretrain_small.yaml")])
    expected = {"width": 128, "layers": 3, "heads": 4, "context": 10, "dropout": 0.1, "batch_size": 64, "lr": 1e-3}
    assert {key: getattr(small, key) for key in expected} == expected


def test_a_run_writes_its_folder(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = main([*arguments, "--export", str(tmp_path / "light.ckpt")])
    run = tmp_path / "runs" / "run"
    assert metrics == read_sealed_json(run / "metrics.json")
    assert metrics["steps"] == 8
    assert metrics["val_loss"] == pytest.approx((metrics["val_loss/reach-v3"] + metrics["val_loss/drawer-open-v3"]) / 2)
    assert 0 < metrics["model_flop_utilisation"] < 1
    assert metrics["updates_per_second"] > 0
    with (run / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == [4, 8]
    assert float(rows[1]["val_loss/reach-v3"]) == pytest.approx(metrics["val_loss/reach-v3"], rel=1e-5)
    out = capsys.readouterr().out
    assert "steps/s" in out
    assert "model FLOP utilisation" in out
    for file in (run / "checkpoints" / "last.ckpt", run / "weights.ckpt", tmp_path / "light.ckpt"):
        module = DecisionTransformerModule.from_pretrained(file)
        assert module.hparams["width"] == 16
    assert set(read_checkpoint(tmp_path / "light.ckpt")["about"]["max_return"]) == set(TASKS.split(","))
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 8
    # finished: reported, not repeated
    assert main(arguments) == metrics
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds another run, with lr=0\.01 \(now 0\.02\)"):
        main([*arguments, "--lr", "2e-2"])


def test_an_interrupted_run_continues_to_the_same_weights(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = main([*arguments, "--name", "whole", "--dropout", "0"])
    again = [*arguments, "--dropout", "0"]
    steps = 0
    original = DecisionTransformerModule.training_step

    def interrupt(self: DecisionTransformerModule, batch: Any, batch_idx: int) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(DecisionTransformerModule, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(again)
    assert "rerun to resume" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "run" / "metrics.json").exists()
    metrics = main(again)
    assert metrics["val_loss"] == whole["val_loss"]
    weights = [read_checkpoint(tmp_path / "runs" / name / "weights.ckpt")["state_dict"] for name in ("run", "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with (tmp_path / "runs" / "run" / "metrics.csv").open() as handle:
        assert [int(row["step"]) for row in csv.DictReader(handle)] == [4, 8]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "push-v2"], "push-v3"),
        (["--tasks", "push-v3"], "no demonstrations of push-v3"),
        (["--data", "nowhere"], "no demonstrations in nowhere"),
        (["--heads", "3"], "heads must divide width 16, got 3"),
        (["--max-steps", "0"], "--max-steps must be a whole number of at least 1, got 0"),
        (["--val-episodes", "6"], "too few for 1 training and 6 held-out episodes"),
        (["--logger", "wand"], "did you mean wandb"),
        (["--rollout-video", "1"], "rollout_video needs a logger that takes videos"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = capsys.readouterr().out
    assert "Pre-train a Decision Transformer" in out
    assert "--rollout-every" in out
