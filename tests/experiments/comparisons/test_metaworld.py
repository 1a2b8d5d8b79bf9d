from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eva_lightning.rl.collection import collect
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments.metaworld import compare, compare_runs, table
from experiments.metaworld.compare_runs import Job, Variant, run_all
from experiments.metaworld.compare_statistics import Interval, loss_after, over_tasks, paired, success
from tests.paths import ROOT

TASK = "handle-press-side-v3"
CONFIG = ROOT / "configs" / "metaworld" / "compare.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task and a pre-trained network, both tiny."""
    folder = tmp_path_factory.mktemp("metaworld")
    collect([TASK], 4, folder / "data", horizon=30, progress=False)
    torch.manual_seed(7)
    data = TrajectoryDataModule(folder / "data", [TASK], context=4, val_episodes=1)
    module = DecisionTransformerModule(**data.statistics, width=16, layers=2, heads=2, context=4)  # type: ignore[arg-type]
    save_weights(module, folder / "init.ckpt")
    return folder


def command(root: Path, output: Path, *more: str) -> list[str]:
    options = {
        "init": root / "init.ckpt", "data": root / "data", "output": output, "tasks": TASK, "methods": "lora,eva:2",
        "seeds": 2, "rank": 2, "train-episodes": 3, "val-episodes": 1, "max-steps": 4, "batch-size": 4, "val-at": "2",
        "eval-episodes": 1, "horizon": 3, "grid": "1e-3,1e-2", "tune-steps": 2, "workers": 0,
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def runs(losses: dict[tuple[str, str, int], float]) -> list[dict[str, Any]]:
    """Runs of (task, variant, seed) with a validation loss after one update, and the same as success."""
    return [
        {"task": task, "variant": variant, "seed": seed, "val_loss": [{"updates": 1, "val_loss": loss}],
         "success_rate": loss}
        for (task, variant, seed), loss in losses.items()
    ]  # fmt: skip


def test_differences_are_taken_within_seed_and_task() -> None:
    # seeds and tasks differ a lot, the methods always by a factor of two
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 0.2, ("b", 1): 0.1}
    found = runs({(t, v, s): x * f for (t, s), x in values.items() for v, f in (("eva:2", 0.5), ("lora", 1.0))})
    ratio = paired(found, ["a", "b"], "eva:2", "lora", loss_after(1), relative=True)
    assert ratio is not None
    assert ratio.mean == pytest.approx(-69.3147, abs=1e-3)
    assert ratio.half == pytest.approx(0.0, abs=1e-9)
    difference = paired(found, ["a"], "eva:2", "lora", success)
    assert difference is not None
    assert difference.mean == pytest.approx(-1.0)
    mean = over_tasks(found, ["a", "b"], "lora", success)
    assert mean is not None
    assert mean.mean == pytest.approx((0.6 + 1.55) / 2)
    # a seed without one of the two is left out
    assert paired(found[:-1], ["a", "b"], "eva:2", "lora", success) == Interval.of([(-0.5 - 0.1) / 2])
    assert paired(found, ["a"], "eva:2", "dora", success) is None


def test_rates_are_tuned_and_the_comparison_can_be_killed_anywhere(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(root, tmp_path)
    run, count = compare_runs.run, iter(range(100))

    def power_cut(job: Job) -> dict[str, Any]:
        if next(count) == 5:
            raise KeyboardInterrupt
        return run(job)

    monkeypatch.setattr(compare_runs.run_all, "__defaults__", (power_cut,))
    with pytest.raises(KeyboardInterrupt):
        compare.main(line)
    monkeypatch.setattr(compare_runs.run_all, "__defaults__", (run,))
    assert len(list(tmp_path.glob("*/*/metrics.json"))) == 5
    assert [run["seed"] for run in compare.main([*line, "--report"])] == [0]
    assert "**Unfinished:** 1 of 4 runs." in (tmp_path / "report.md").read_text()
    results = compare.main(line)
    printed = capsys.readouterr().out
    assert "tuning: 4 runs of 2 updates, 0 of them finished" in printed
    assert "comparison: 1 of 4 runs are finished already" in printed
    assert [(r["variant"], r["seed"]) for r in results] == [("lora", 0), ("eva:2", 0), ("lora", 1), ("eva:2", 1)]
    rates = yaml.safe_load((tmp_path / "rates.yaml").read_text())
    assert {r["variant"]: r["lr"] for r in results} == rates["rates"]
    for key, worth in rates["scores"].items():
        assert min(worth, key=worth.get) == rates["rates"][key]
    with (tmp_path / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 4
    assert float(rows[1]["val_loss_4"]) == results[1]["val_loss"][-1]["val_loss"]
    report = (tmp_path / "report.md").read_text()
    assert "- EVA ρ=2 minus LoRA, over the tasks: loss after 2" in report
    assert "## EVA ρ=2 minus LoRA, run by run" in report
    assert all((tmp_path / name).is_file() for name in ("losses.png", "success.png", "tables.md"))
    # finished, it is written anew; the table command reads it too
    assert compare.main(line) == results
    assert (tmp_path / "report.md").read_text() == report
    assert "| **ours** | **LoRA (r=2)** |" in table.main(["--runs", str(tmp_path)])
    with pytest.raises(ValueError, match="holds another run, with train_episodes=3"):
        compare.main([*line, "--train-episodes=2"])


def test_a_run_is_that_of_the_finetune_command(root: Path, tmp_path: Path) -> None:
    from experiments.metaworld import finetune

    (compared,) = compare.main(command(root, tmp_path, "--methods=eva:2", "--seeds=1", "--rates=eva:2=0.01"))
    options = [word for word in command(root, tmp_path / "same") if "grid" not in word and "tune" not in word]
    options = [word.replace("--tasks", "--task") for word in options if "methods" not in word and "workers" not in word]
    more = ["--method=eva", "--rho=2", "--lr=0.01", "--seeds=1", "--accelerator=cpu", "--progress=false"]
    (alone,) = finetune.main([*options, *more])
    assert compared["val_loss"] == alone["val_loss"]
    assert compared["ranks"] == alone["ranks"]
    assert compared["returns"] == pytest.approx(alone["returns"], rel=1e-4)


def test_a_failed_run_is_reported_and_tried_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = command(root, tmp_path, "--rates=lora=0.01,eva:2=0.01")
    run = compare_runs.run

    def breaks(job: Job) -> dict[str, Any]:
        if job.variant.method == "eva" and job.seed == 1:
            raise RuntimeError("out of luck")
        return run(job)

    monkeypatch.setattr(compare_runs.run_all, "__defaults__", (breaks,))
    assert len(compare.main(line)) == 3
    report = (tmp_path / "report.md").read_text()
    assert "**1 runs failed**" in report
    assert f"- {TASK}, EVA ρ=2, lr 0.01, seed 1: RuntimeError: out of luck" in report
    (record,) = tmp_path.glob("runs/*/error.txt")
    assert "out of luck" in record.read_text()
    monkeypatch.setattr(compare_runs.run_all, "__defaults__", (run,))
    assert len(compare.main(line)) == 4
    assert not record.exists()


@pytest.mark.slow
def test_processes_give_what_one_process_gives(root: Path, tmp_path: Path) -> None:
    line = command(root, tmp_path / "one", "--seeds=1", "--rates=lora=0.01,eva:2=0.01")
    alone = compare.main(line)
    settings = compare.parse([*line, f"--output={tmp_path / 'two'}"])
    outcomes = list(run_all(compare.comparison_jobs(settings, settings.given_rates), workers=2))
    found = {outcome.job.variant.key: outcome.metrics for outcome in outcomes}
    for metrics in alone:
        other = found[metrics["variant"]]
        assert other is not None
        assert [row["val_loss"] for row in other["val_loss"]] == pytest.approx(
            [row["val_loss"] for row in metrics["val_loss"]], rel=1e-5
        )


def test_the_plan_runs_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(command(root, tmp_path / "out", "--plan")) == []
    printed = capsys.readouterr().out
    assert "comparison: 4 runs of 4 updates and 1 episodes (2 methods x 1 tasks x 2 seeds)" in printed
    assert "estimate: " in printed
    assert not (tmp_path / "out").exists()


def test_the_config_that_is_shipped() -> None:
    settings = compare.parse([f"--config={CONFIG}"])
    assert len(settings.task_names) == 4
    assert [variant.label for variant in settings.variants] == [
        "scratch", "FFT", "LoRA", "DoRA", "EVA ρ=1", "EVA ρ=2", "EVA+DoRA ρ=2",
    ]  # fmt: skip
    assert settings.val_steps == (0, 10, 25, 50, 150, 500)
    assert len(compare.comparison_jobs(settings, dict.fromkeys((v.key for v in settings.variants), 0.001))) == 140
    assert Variant.parse("eva:1.5").key == "eva:1.5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--methods=lora,evva:2", "unknown method 'evva': did you mean eva"),
        ("--methods=eva", "a method is written like eva:2 (with ρ) or lora (without), got 'eva'"),
        ("--methods=lora:2", "got 'lora:2'"),
        ("--methods=eva:0.5", "ρ must be at least 1, got 'eva:0.5'"),
        ("--methods=lora,lora", "methods must differ"),
        ("--grid=fast", "grid must be numbers with commas between them, got 'fast'"),
        ("--rates=lora:x", "rates must be written as lora=0.01"),
        ("--tune=false", "rates must name every method when tune is false; lora is missing"),
        ("--tasks=push-v2", "did you mean push-v3"),
        ("--init=nowhere.ckpt", "there is no checkpoint nowhere.ckpt"),
        ("--train-episodes=9", "has 4 episodes of handle-press-side-v3, but 10 are needed"),
        ("--horizon=501", "horizon must be from 1 to 500"),
        ("--seeds=0", "seeds must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.command_line(command(root, tmp_path / "bad", change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bad").exists()
