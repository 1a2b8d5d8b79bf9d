from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pandas import DataFrame

from eva_lightning.sealed import read_sealed_json
from experiments.comparisons import metaworld, metaworld_comparison, metaworld_report
from experiments.metaworld import finetune, table
from experiments.runner.jobs import Job
from experiments.runner.results import Results
from experiments.runner.run_folder import Work
from tests.eva_lightning.rl.tiny import TASK, make_robot
from tests.paths import ROOT

CONFIG = ROOT / "configs" / "metaworld" / "compare.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task and a pre-trained network, both tiny."""
    folder = tmp_path_factory.mktemp("metaworld")
    return make_robot(folder)


def command(root: Path, output: Path, *more: str) -> list[str]:
    options = {
        "init": root / "init.ckpt", "data": root / "data", "output": output, "tasks": TASK, "methods": "lora,eva",
        "seeds": 2, "rank": 2, "train-episodes": 3, "val-episodes": 1, "max-steps": 4, "batch-size": 4, "val-at": "2",
        "eval-episodes": 1, "horizon": 3, "grid": "1e-3,1e-2", "tune-steps": 2, "workers": 0, "progress": "false",
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def run(line: list[str]) -> Results:
    return metaworld.main(line)


def test_it_resumes_after_a_power_cut(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, build, begun = command(root, tmp_path), metaworld_comparison.build, iter(range(100))

    def power_cut(job: Job) -> Work:
        if next(begun) == 5:
            raise KeyboardInterrupt
        return build(job)

    monkeypatch.setattr(metaworld_comparison, "build", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run(line)
    assert len(list(tmp_path.glob("*/*/metrics.json"))) == 5
    monkeypatch.setattr(metaworld_comparison, "build", build)
    partly = run([*line, "--report"]).runs
    assert 0 < len(partly) < 4
    assert f"**Unfinished:** {len(partly)} of 4 runs." in (tmp_path / "report.md").read_text()
    results = run(line)
    assert "5 done, 0 failed" in capsys.readouterr().out
    runs = results.runs.set_index(["method", "seed"])
    assert sorted(runs.index) == [("eva", 0), ("eva", 1), ("lora", 0), ("lora", 1)]
    choices = read_sealed_json(tmp_path / "choices.json")
    for method, choice in choices.items():
        assert set(results.runs.loc[results.runs["method"] == method, "lr"]) == {choice["lr"]}
        assert choice["score"] == min(each["score"] for each in choice["candidates"])
    with (tmp_path / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 4
    for row in rows:
        loss = runs.loc[(row["method"], int(row["seed"])), "val_loss"][-1]["val_loss"]
        assert float(row["val_loss_4"]) == pytest.approx(loss)
    report = (tmp_path / "report.md").read_text()
    assert "- EVA minus LoRA: loss after 2 steps" in report
    assert "## EVA minus LoRA, run by run" in report
    for phrase in ("any step", "the last step"):
        assert f"### Success at {phrase} of the episode" in report
        assert f"; success at {phrase} " in report
    assert "The paper's numbers belong beside success at the last step" in report
    assert all((tmp_path / f"{name}.png").is_file() for name in ("losses", "success", "differences"))
    # finished, the report is written again and nothing is run; the table command reads the runs too
    monkeypatch.setattr(metaworld_comparison, "build", power_cut)
    assert run(line).runs.equals(results.runs)
    assert (tmp_path / "report.md").read_text() == report
    assert "| **ours** LoRA (r=2), last step " in str(table.main(["--runs", str(tmp_path)]))
    # a run of other settings is another run
    assert run([*line, "--train-episodes=2", "--report"]).runs.empty


def test_runs_that_lack_a_definition_of_success_have_dashes(root: Path, tmp_path: Path) -> None:
    rows = [
        {
            "method": method, "task": TASK, "seed": seed, "lr": 1e-3, "success_rate": 0.5 + seed / 4,
            "val_loss": [{"updates": step, "val_loss": 0.5 - seed / 10} for step in (0, 2, 4)],
        }
        for method in ("lora", "eva:2") for seed in (0, 1)
    ]  # fmt: skip
    settings = metaworld.parse(command(root, tmp_path, "--success=final"))
    found = metaworld_report.write(settings, Results(DataFrame(rows), DataFrame(), {})).read_text()
    last, any_step = found.split("### Success at ")[1:]
    assert last.startswith("the last step of the episode")
    line = next(line for line in last.splitlines() if line.startswith("| LoRA"))
    assert {cell.strip() for cell in line.split("|")[2:-1]} == {"–"}
    assert "0.62 ± 1.59" in any_step


def test_a_run_is_that_of_the_finetune_command(root: Path, tmp_path: Path) -> None:
    compared = run(command(root, tmp_path, "--methods=eva", "--seeds=1", "--rates=eva:2=0.01")).runs.iloc[0]
    skipped = ("grid", "tune", "methods", "workers", "progress")
    options = [
        word for word in command(root, tmp_path / "same") if not word.startswith(tuple(f"--{n}" for n in skipped))
    ]
    options = [word.replace("--tasks", "--task") for word in options]
    more = ["--method=eva", "--rho=2", "--lr=0.01", "--seeds=1", "--accelerator=cpu", "--progress=false"]
    (alone,) = finetune.main([*options, *more])
    assert compared["val_loss"] == alone["val_loss"]
    assert compared["ranks"] == alone["ranks"]
    assert compared["returns"] == pytest.approx(alone["returns"], rel=1e-4)


@pytest.mark.slow
def test_processes_give_what_one_process_gives(root: Path, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        more = ("--seeds=1", "--rates=lora=0.01,eva=0.01", f"--workers={workers}")
        found.append(run(command(root, tmp_path / str(workers), *more)).runs.set_index("method"))
    for method in ("lora", "eva"):
        alone, together = ([row["val_loss"] for row in runs.loc[method, "val_loss"]] for runs in found)
        assert together == pytest.approx(alone, rel=1e-5)


def test_the_plan_runs_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(root, tmp_path / "out", "--plan")).runs.empty
    printed = capsys.readouterr().out
    assert "tuning: 4 runs, 0 of them finished" in printed
    assert "comparison: runs of 4 steps and 1 episodes (2 methods x 1 tasks x 2 seeds)" in printed
    assert "estimate: " in printed
    assert not (tmp_path / "out").exists()


def test_the_config_that_is_shipped() -> None:
    settings = metaworld.parse([f"--config={CONFIG}"])
    assert len(settings.task_names) == 4
    assert list(settings.labels.values()) == [
        "From scratch", "FFT", "LoRA", "DoRA", "EVA (ρ = 1)", "EVA", "EVA+DoRA",
    ]  # fmt: skip
    assert settings.val_steps == (10, 25, 50, 150, 500)
    cells = metaworld_comparison.MetaWorld(settings).cells()
    assert sum(len(cell.final(cell.points[0])) for cell in cells) == 140
    assert sum(len(cell.tune(point)) for cell in cells for point in cell.points) == 140
    # the defaults are the same, but for the checkpoint
    assert settings == metaworld.parse([f"--init={settings.init}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--methods=lora,evva:2", "unknown method 'evva': did you mean eva"),
        ("--methods=linear", "unknown method 'linear'"),
        ("--methods=lora:2", "lora has no rho"),
        ("--methods=eva:0.5", "rho of eva must be a number of at least 1, got 0.5"),
        ("--methods=lora,lora", "--methods must be named, and differ"),
        ("--grid=fast", "--grid must be a list, each item a number"),
        ("--rates=lora:x=1", "what follows the colon in 'lora:x' must be rho"),
        ("--tune=false", "--rates must name every method when tune is false; lora is missing"),
        ("--tasks=push-v2", "did you mean push-v3"),
        ("--init=nowhere.ckpt", "there is no checkpoint nowhere.ckpt"),
        ("--train-episodes=9", "has 4 episodes of handle-press-side-v3, but 10 are needed"),
        ("--horizon=501", "--horizon must be a whole number of at least 1 and of at most 500, got 501"),
        ("--seeds=0", "--seeds must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metaworld.command_line(command(root, tmp_path / "bad", change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bad").exists()
