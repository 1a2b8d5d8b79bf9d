from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eva_lightning.errors import InputError
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.rl.tasks import MT40
from eva_lightning.sealed import read_sealed_json
from experiments.metaworld import finetune
from experiments.metaworld.pretrain import Settings, command_line, main, parse
from experiments.runner.settings import identity
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


def test_fine_tuning_takes_the_protocol_of_its_checkpoint(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = main([*arguments, "--protocol=l2m", "--export", str(tmp_path / "l2m.ckpt")])
    printed = capsys.readouterr().out
    assert "protocol l2m; what its source does otherwise" in printed
    assert "fp16" in printed
    found = read_checkpoint(tmp_path / "l2m.ckpt")
    assert (metrics["protocol"], found["about"]["protocol"]) == ("l2m", "l2m")
    scales = [found["hyper_parameters"][name] for name in ("return_scale", "reward_scale")]
    assert scales == [200, 200]
    assert set(found["hyper_parameters"]["state_mean"]) == {0.0}
    line = [
        "--task=reach-v3", f"--init={tmp_path / 'l2m.ckpt'}", f"--data={tmp_path / 'data'}", "--method=lora",
        "--seeds=1", "--train-episodes=4", "--val-episodes=1", "--max-steps=2", "--batch-size=4", "--rank=2",
        "--eval-episodes=0", "--accelerator=cpu", f"--output={tmp_path / 'fine'}", "--progress=false", "--name=a",
    ]  # fmt: skip
    (tuned,) = finetune.main(line)
    assert tuned["protocol"] == "l2m"
    assert "protocol l2m" in capsys.readouterr().out
    merged = DecisionTransformerModule.from_pretrained(tmp_path / "fine" / "a-0" / "weights.ckpt")
    assert merged.model.action_tanh
    assert merged.decay_weights_only
    assert finetune.command_line([*line, "--name=b", "--protocol=l2m"]) == 0
    assert finetune.command_line([*line, "--name=c", "--protocol=default"]) == 2
    error = capsys.readouterr().err
    assert "l2m.ckpt was pre-trained by protocol l2m, and protocol=default was asked for" in error
    assert error.count("\n") == 1


def test_the_default_protocol_is_no_part_of_a_runs_identity() -> None:
    assert "protocol" not in identity(Settings())
    assert identity(Settings(protocol="l2m"))["protocol"] == "l2m"


def _flipped(content: bytes) -> bytes:
    half = len(content) // 2
    return content[:half] + bytes(byte ^ 0xFF for byte in content[half : half + 4]) + content[half + 4 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda content: content,
    "four bytes flipped": _flipped,
    "cut": lambda content: content[:-200],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_interrupted_run_continues_to_the_same_weights(
    damage: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    last = tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(DAMAGES[damage](last.read_bytes()))
    metrics = main(again)
    said, start = capsys.readouterr().out, "last.ckpt" if damage == "whole" else "last.ckpt.previous"
    assert f"resuming from {last.with_name(start)}\n" in said
    assert ("set aside as last.ckpt.damaged, going back to the checkpoint before it" in said) == (damage != "whole")
    assert metrics["val_loss"] == whole["val_loss"]
    weights = [read_checkpoint(tmp_path / "runs" / name / "weights.ckpt")["state_dict"] for name in ("run", "whole")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    # the end of the run is a checkpoint of the project as well: a damaged one is an error, not another network
    file = tmp_path / "runs" / "run" / "weights.ckpt"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    if damage != "whole":
        with pytest.raises(InputError, match=r"weights\.ckpt is damaged or no checkpoint \("):
            read_checkpoint(file)
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
        parse(["--help-all"])
    out = capsys.readouterr().out
    assert "Pre-train a Decision Transformer" in out
    assert "--rollout-every" in out
