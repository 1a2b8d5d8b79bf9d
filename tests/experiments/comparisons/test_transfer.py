from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.methods import method_names
from experiments.comparisons import transfer, transfer_comparison, transfer_run
from experiments.comparisons.transfer_comparison import Transfer
from experiments.runner.jobs import Job
from experiments.runner.results import Results
from experiments.runner.run_folder import RunFolder, Work
from tests.eva_lightning.vision.fakes import make_task
from tests.paths import ROOT

CONFIG = ROOT / "configs" / "vtab" / "transfer.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of eight classes."""
    folder = tmp_path_factory.mktemp("vtab-1k")
    make_task(folder, "caltech101", classes=8, counts={"train800": 32, "val200": 16, "test": 48})
    return folder


@pytest.fixture(scope="module")
def pretrained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder that holds pre-trained weights and decoded images, and nothing else."""
    output = tmp_path_factory.mktemp("pretrained")
    Transfer(transfer.parse(command(root, output))).prepare()
    return output


@pytest.fixture
def output(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(pretrained, tmp_path / "output"))


def command(root: Path, output: Path, *more: str) -> list[str]:
    options = {
        "root": root, "output": output, "methods": "lora,eva:1", "seeds": 2, "rank": 2, "epochs": 2, "eval-epochs": 1,
        "batch-size": 8, "grid": "1e-3,1e-2", "extend": 0, "train-images": 16, "validation-images": 6,
        "pretrain-epochs": 1, "workers": 0, "progress": "false",
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def run(line: list[str]) -> Results:
    return transfer.main(line)


def losing(loss: Callable[[transfer_run.Run], float]) -> Callable[[Job], Work]:
    """Runs without training, of a loss that depends on their settings."""

    def build(job: Job) -> Work:
        def work(folder: RunFolder) -> dict[str, Any]:
            row = {"loss": loss(job.settings), "accuracy": 0.5, "class_accuracy": 0.25}
            return {"evaluations": [{"epoch": epoch, **row} for epoch in job.settings.eval_epochs], "seconds": 60.0}

        return work

    return build


def test_it_resumes_after_a_power_cut(
    root: Path, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, begun = command(root, output), iter(range(100))

    def power_cut(job: Job) -> Work:
        if next(begun) == 5:
            raise KeyboardInterrupt
        return transfer_run.build(job)

    monkeypatch.setattr(transfer_comparison, "build", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(line)
    assert len(list(output.glob("*/*/metrics.json"))) == 5
    monkeypatch.setattr(transfer_comparison, "build", transfer_run.build)
    partly = run([*line, "--report"]).runs
    assert 0 < len(partly) < 4
    assert f"**Unfinished:** {len(partly)} of 4 runs." in (output / "report.md").read_text()
    results = run(line)
    assert "5 done, 0 failed" in capsys.readouterr().out
    runs = results.runs.set_index(["method", "seed"])
    assert sorted(runs.index) == [("eva:1", 0), ("eva:1", 1), ("lora", 0), ("lora", 1)]
    assert [row["epoch"] for row in runs.loc[("lora", 0), "evaluations"]] == [1, 2]
    with (output / "results.csv").open() as handle:
        for row in csv.DictReader(handle):
            last = runs.loc[(row["method"], int(row["seed"])), "evaluations"][-1]
            assert float(row["loss_2"]) == pytest.approx(last["loss"])
    report = (output / "report.md").read_text()
    assert "| EVA (ρ = 1) " in report
    assert "on the same 16 images of the other 4 classes" in report
    assert "It is tested on the 32 other images" in report
    assert "Still at an edge" in report
    for name in ("curves.png", "differences.png"):
        assert (output / name).is_file()
    # finished, the report is written again and nothing is run
    monkeypatch.setattr(transfer_comparison, "build", power_cut)
    assert run(line).runs.equals(results.runs)
    assert (output / "report.md").read_text() == report
    # a run of other settings is another run
    assert run([*line, "--epochs=1", "--report"]).runs.empty


def test_the_grid_grows_until_the_best_learning_rate_is_inside(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimum = {"lora": 1.5e-3, "eva:1": 4e-2, "fft": 1e-5}
    tried: list[tuple[str, float, int]] = []

    def loss(run: transfer_run.Run) -> float:
        if run.phase == "tune":
            tried.append((run.method, run.lr, run.seed))
        return math.log(run.lr / optimum[run.method]) ** 2

    monkeypatch.setattr(transfer_comparison, "build", losing(loss))
    more = ("--methods=lora,eva:1,fft", "--extend=2", "--tune-seeds=2", "--grid=1e-3,3e-3,1e-2")
    results = run(command(root, output, *more))
    scores = {key: sorted(point.get("lr") for point in choice.candidates) for key, choice in results.choices.items()}
    assert scores == {
        "lora": [3e-4, 1e-3, 3e-3, 1e-2],
        "eva:1": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "fft": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],  # stopped by extend
    }
    chosen = {key: choice.point.get("lr") for key, choice in results.choices.items()}
    assert chosen == {"lora": 1e-3, "eva:1": 3e-2, "fft": 1e-4}
    assert {seed for _, _, seed in tried} == {100, 101}
    assert len(tried) == len(set(tried)) == 2 * (4 + 5 + 5)
    assert "so perhaps not the best there is: FFT." in (output / "report.md").read_text()


def test_a_learning_rate_that_diverged_or_failed_is_not_chosen(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(run: transfer_run.Run) -> float:
        if run.phase == "tune" and run.method == "eva:1":
            raise RuntimeError("out of luck")
        if run.phase == "tune" and (run.lr, run.seed) == (1e-2, 101):
            return math.nan
        return 1.0 if run.lr == 1e-3 else 0.1

    monkeypatch.setattr(transfer_comparison, "build", losing(loss))
    results = run(command(root, output, "--tune-seeds=2", "--skip-failed"))
    assert {key: choice.point.get("lr") for key, choice in results.choices.items()} == {"lora": 1e-3}
    assert results.runs["method"].tolist() == ["lora"] * 2
    assert results.without_choice == ("eva:1",)
    assert "| diverged |" in (output / "report.md").read_text()


def test_a_failed_run_is_reported_and_run_again_when_asked(
    root: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(root, output, "--methods=linear,linear-random,scratch", "--seeds=1", "--epochs=1")
    line.append("--rates=linear=0.03,linear-random=0.03,scratch=0.003")

    def breaks(job: Job) -> Work:
        if job.settings.method == "scratch":
            raise RuntimeError("out of luck")
        return transfer_run.build(job)

    monkeypatch.setattr(transfer_comparison, "build", breaks)
    assert transfer.command_line(line) == 1
    report = (output / "report.md").read_text()
    assert "- From scratch, lr 0.003, seed 0: RuntimeError: out of luck" in report
    assert "Given: Linear: 0.03; Linear, random weights: 0.03; From scratch: 0.003." in report
    (record,) = output.glob("runs/*/error.txt")
    monkeypatch.setattr(transfer_comparison, "build", transfer_run.build)
    assert transfer.command_line(line) == 1
    runs = run([*line, "--retry-failed"]).runs.set_index("method")
    assert not record.exists()
    assert runs.loc["linear", "trainable_parameters"] == runs.loc["linear-random", "trainable_parameters"] == 4 * 64 + 4
    assert runs.loc["scratch", "trainable_parameters"] > 200_000
    assert runs.loc["linear", "evaluations"] != runs.loc["linear-random", "evaluations"]


@pytest.mark.slow
def test_processes_give_what_one_process_gives(root: Path, pretrained: Path, tmp_path: Path) -> None:
    more = ("--methods=lora,eva-dora:2", "--seeds=1", "--rates=lora=0.01,eva-dora=0.01")
    found = []
    for workers in (0, 2):
        output = shutil.copytree(pretrained, tmp_path / str(workers))
        found.append(run(command(root, Path(output), *more, f"--workers={workers}")).runs.set_index("method"))
    for method in ("lora", "eva-dora"):
        alone, together = (runs.loc[method, "evaluations"] for runs in found)
        for a, b in zip(alone, together, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_the_plan_runs_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(root, tmp_path / "out", "--plan")).runs.empty
    printed = capsys.readouterr().out
    assert "tuning: 4 runs, 0 of them finished" in printed
    assert "final: 4 runs, 0 of them finished" in printed
    assert "comparison: on 16 images of 4 classes, 32 to test on" in printed
    assert "estimate: " in printed
    assert not (tmp_path / "out").exists()


def test_the_config_that_is_shipped() -> None:
    settings = transfer.parse([f"--config={CONFIG}"])
    methods = {key.partition(":")[0] for key in settings.labels}
    assert methods - {*method_names("vision")} == {"scratch", "linear-random"}
    assert {"eva", "eva:1", "scratch", "linear-random"} < set(settings.labels)
    assert settings.seeds >= 3
    assert settings.evaluated_epochs == (1, 2, 3, 6)
    # the defaults are the same, so the command alone does it
    assert settings == transfer.parse([])
    assert transfer.parse(["--methods=eva:2,eva:1"]).labels == {"eva": "EVA", "eva:1": "EVA (ρ = 1)"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--methods=lora,evva:2", "unknown method 'evva': did you mean eva"),
        ("--methods=lora,eva:0.5", "rho of eva must be a number of at least 1, got 0.5"),
        ("--methods=eva,eva:2", "--methods must be named, and differ"),
        ("--grid=fast", "--grid must be a list, each item a number"),
        ("--grid=0,1e-3", "--grid must be a number above 0, got 0.0"),
        ("--eval-epochs=0,2", "--eval-epochs must be a whole number of at least 1, got 0"),
        ("--rates=lora:x=0.01", "what follows the colon in 'lora:x' must be rho"),
        ("--rates=lora=x", "--rates must be a mapping, each value a number"),
        ("--rates=lora=-1", "the learning rate of lora must be a number above 0, got -1"),
        ("--seeds=0", "--seeds must be a whole number of at least 1, got 0"),
        ("--root=nowhere", "needs the caltech101 folder of VTAB-1K"),
        ("--train-images=30", "has 24 images to fine-tune on (half of those of 4 classes), but 30 are asked for"),
        ("--validation-images=16", "validation images must be from 1 to 15 of the 16 training images, got 16"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer.command_line(command(root, tmp_path / "bad", change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_without_finished_runs_there_is_no_report(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer.command_line(command(root, tmp_path / "out", "--report")) == 0
    assert "nothing to report yet" in capsys.readouterr().out
