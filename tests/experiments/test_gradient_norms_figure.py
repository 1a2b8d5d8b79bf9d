"""Figure 4 from runs: what both command lines record, and what is drawn of it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from experiments.analysis import gradient_norms
from experiments.metaworld import finetune
from experiments.runner.gradient_norms import FILE
from experiments.runner.run_folder import RunFolder
from experiments.vtab import settings as vtab
from tests.eva_lightning.rl.tiny import TASK, make_robot
from tests.eva_lightning.vision.fakes import make_task


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of LoRA and one run of EVA and of full fine-tuning on one task of each half."""
    folder = tmp_path_factory.mktemp("runs")
    make_robot(folder, episodes=3, horizon=20)
    for method, seeds in (("lora", 2), ("eva", 1), ("fft", 1)):
        text = (
            f"--task {TASK} --init {folder / 'init.ckpt'} --data {folder / 'data'} --output {folder / 'runs'} "
            f"--method {method} --seeds {seeds} --train-episodes 2 --val-episodes 1 --max-steps 4 --batch-size 4 "
            "--eval-episodes 0 --rank 2 --progress false --accelerator cpu --gradient-norms 3"
        )
        finetune.main(text.split())
    make_task(folder / "images")
    text = (
        f"--root {folder / 'images'} --task kitti --model test_vit --weights none --image-size 32 --batch-size 8 "
        f"--rank 2 --epochs 2 --accelerator cpu --output {folder / 'runs'} --name vision --gradient-norms 2 "
        "--plots false"
    )
    vtab.main(text.split())
    return folder / "runs"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / FILE).open() as file:
        return list(csv.DictReader(file))


def test_both_command_lines_write_a_row_per_step(runs: Path) -> None:
    assert [row["step"] for row in rows_of(runs / "vision")] == ["1", "2"]
    assert float(rows_of(runs / "vision")[0]["b"]) > 0
    (fft,) = runs.glob("*-fft-*")
    assert [(row["step"], row["a"], float(row["norm"]) > 0) for row in rows_of(fft)] == [
        (str(step), "", True) for step in (1, 2, 3)
    ]


def test_recording_does_not_change_a_runs_identity(tmp_path: Path) -> None:
    one, other = (["--task", TASK, "--init", "x", *more] for more in ([], ["--gradient-norms=9"]))
    assert RunFolder("", finetune.parse(one)).id == RunFolder("", finetune.parse(other)).id
    one, other = (["--task", "kitti", "--root", "x", *more] for more in ([], ["--gradient-norms=9"]))
    assert RunFolder("", vtab.parse(one)).id == RunFolder("", vtab.parse(other)).id


def test_a_figure_per_task_and_a_line_per_method(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = gradient_norms.main([f"--runs={runs}", f"--output={tmp_path}"])
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"fig4_gradient_{kind}_{task}.png" for kind in ("norms", "a_and_b") for task in (TASK, "kitti")
    }
    of_task = rows[rows["task"] == TASK]
    assert of_task.groupby("method")["run"].nunique().to_dict() == {"eva": 1, "fft": 1, "lora": 2}
    printed = capsys.readouterr().out
    first = [float(rows_of(folder)[0]["norm"]) for folder in runs.glob(f"{TASK}-lora-*")]
    (line,) = (line for line in printed.splitlines() if "LoRA" in line)
    assert f"{sum(first) / 2:.3g}" in line
    assert all(word in printed for word in ("FFT", "EVA", TASK, "kitti"))


def test_mistakes_are_one_sentence(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        ([f"--runs={tmp_path}"], f"no run below {tmp_path} has a gradient_norms.csv: make runs with"),
        ([f"--runs={tmp_path / 'none'}"], "--runs: there is no folder"),
        ([f"--runs={runs}", "--tasks=push-v3"], f"--tasks must be among those of the runs, {TASK}, kitti, got push-v3"),
    ):
        assert gradient_norms.command_line([*words, f"--output={tmp_path / 'out'}"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {sentence}")
    damaged = tmp_path / "runs" / "one"
    damaged.mkdir(parents=True)
    (damaged / FILE).write_text("step,a\n1,2\n")
    (damaged / "config.yaml").write_text("method: lora\n")
    assert gradient_norms.command_line([f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert str(damaged / FILE) in error
    assert error.count("\n") == 1
