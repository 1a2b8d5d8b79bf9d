"""Comparisons that look at success early and late, with several numbers of demonstrations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from eva_lightning.rl.rollouts import evaluate
from eva_lightning.rl.tasks import CW10, MT40
from experiments.comparisons import looks_report, metaworld, metaworld_comparison
from experiments.metaworld import finetune, finetune_run
from experiments.runner.jobs import Point
from experiments.runner.results import Results
from tests.eva_lightning.rl.tiny import TASK, make_robot
from tests.paths import ROOT

CONFIG = ROOT / "configs" / "metaworld" / "few_demonstrations.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task and a pre-trained network, both tiny."""
    return make_robot(tmp_path_factory.mktemp("looks"), layers=1)


def command(root: Path, output: Path, *more: str) -> list[str]:
    options = {
        "init": root / "init.ckpt", "data": root / "data", "output": output, "tasks": TASK, "methods": "lora,eva",
        "seeds": 1, "rank": 2, "demonstrations": "2,3", "val-episodes": 1, "max-steps": 4, "batch-size": 4,
        "val-at": "2", "look-at": "2", "eval-episodes": 2, "horizon": 3, "zero-shot": "true", "workers": 0,
        "grids": "{eva: [0.001, 0.01]}", "rates": "lora=0.01", "tune-steps": 2, "progress": "false",
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def test_each_number_of_demonstrations_is_tuned_and_compared_alone(root: Path, tmp_path: Path) -> None:
    results: Results = metaworld.main(command(root, tmp_path))
    runs = results.runs
    # EVA: two rates for each number; then 2 methods x 2 numbers, and the network before fine-tuning twice
    assert (len(results.tuning), len(runs)) == (4, 6)
    assert sorted(results.choices) == [
        "eva, 2 demonstrations", "eva, 3 demonstrations", "lora, 2 demonstrations", "lora, 3 demonstrations",
        "none, 2 demonstrations", "none, 3 demonstrations",
    ]  # fmt: skip
    for run in runs[runs["method"] != "none"].to_dict("records"):
        assert run["train_episodes"] == run["demonstrations"]
        assert [(row["updates"], len(row["successes"])) for row in run["looks"]] == [(2, 2)]
    assert set(results.tuning["seed"]) == {100}
    assert results.tuning["success_rate"].isna().all()
    table = pd.read_csv(tmp_path / "results.csv").set_index(["method", "demonstrations", "seed"])
    for run in runs[runs["method"] != "none"].to_dict("records"):
        row = table.loc[(run["method"], run["demonstrations"], run["seed"])]
        assert row["success_rate_2"] == run["looks"][0]["success_rate"]
        assert row["final_success_rate_4"] == run["final_success_rate"]
        assert row["val_loss_2"] == pytest.approx(run["val_loss"][1]["val_loss"])
    report = (tmp_path / "report.md").read_text()
    assert "| pre-trained, zero-shot " in report
    assert "| EVA, 3 demonstrations " in report.partition("## Learning rates")[2]
    assert all((tmp_path / name).is_file() for name in looks_report.FIGURES)
    assert set(pd.read_csv(tmp_path / "choices.csv")["demonstrations"]) == {2, 3}
    # nothing is run again, and more seeds add to what is there
    more = metaworld.main(command(root, tmp_path, "--seeds=2", "--report"))
    assert (set(more.runs["id"]), more.left) == (set(runs["id"]), 4)
    assert "**Unfinished:** 6 of 10 runs." in (tmp_path / "report.md").read_text()


def test_a_look_is_the_network_of_that_step_and_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, Any] = {}

    class Keeper(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            kept[trainer.global_step] = copy.deepcopy(pl_module.model)

    make_trainer = finetune_run.make_trainer

    def with_keeper(*args: Any, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
        return make_trainer(*args, callbacks=[Keeper(), *callbacks], **options)

    options = {
        "task": TASK, "init": root / "init.ckpt", "data": root / "data", "method": "eva", "rank": 2, "lr": 0.05,
        "seeds": 1, "train-episodes": 3, "val-episodes": 1, "max-steps": 4, "batch-size": 4, "val-at": "2",
        "eval-episodes": 2, "horizon": 5, "progress": "false", "accelerator": "cpu", "save": "false",
    }  # fmt: skip
    line = [f"--{name}={value}" for name, value in options.items()]
    (without,) = finetune.main([*line, f"--output={tmp_path / 'without'}"])
    monkeypatch.setattr(finetune_run, "make_trainer", with_keeper)
    (found,) = finetune.main([*line, f"--output={tmp_path / 'with'}", "--look-at=2,4,9"])
    # the last look is the end
    assert [row["updates"] for row in found["looks"]] == [2]
    assert "looks" not in without
    for name in ("val_loss", "returns", "successes"):
        assert found[name] == without[name]
    module = finetune_run._load(finetune.parse([*line, "--output=x"]))
    module.model = kept[2]
    by_hand = evaluate(module, TASK, target_return=found["target_return"], episodes=2, horizon=5)
    assert found["looks"][0]["returns"] == pytest.approx(by_hand.returns.tolist(), rel=1e-3)
    assert found["looks"][0]["returns"] != pytest.approx(found["returns"], rel=1e-5)


def _made_up(tasks: list[str], seeds: int) -> pd.DataFrame:
    """Runs with success that differs between methods, tasks, numbers and looks."""
    draw = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for number in (5, 20):
        for task in tasks:
            rows.append({"method": "none", "task": task, "seed": 0, "demonstrations": number, "success_rate": 0.1,
                         "final_success_rate": 0.0})  # fmt: skip
            for method in ("lora", "eva"):
                for seed in range(seeds):
                    early, late = draw.integers(0, 11, 2) / 10 + (0.1 if method == "eva" else 0.0)
                    rows.append({
                        "method": method, "task": task, "seed": seed, "demonstrations": number, "lr": 0.01,
                        "success_rate": late, "final_success_rate": late / 2,
                        "looks": [{"updates": 25, "success_rate": early, "final_success_rate": early / 2}],
                        "val_loss": [{"updates": s, "val_loss": 1.0 / (1 + s) + draw.random()} for s in (0, 25, 200)],
                    })  # fmt: skip
    return pd.DataFrame(rows)


def _cells(section: str, label: str) -> list[str]:
    line = next(line for line in section.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip().strip("*") for cell in line.split("|")[2:-1]]


def test_the_report_agrees_with_scipy(root: Path, tmp_path: Path) -> None:
    tasks, seeds = ["push-v3", "hammer-v3", "stick-pull-v3"], 4
    runs = _made_up(tasks, seeds)
    settings = metaworld.parse([
        f"--init={root / 'init.ckpt'}", "--methods=lora,eva", "--demonstrations=5,20", "--look-at=25",
        "--val-at=25", "--max-steps=200", "--seeds=4", f"--tasks={','.join(tasks)}", f"--output={tmp_path}",
    ])  # fmt: skip
    report = looks_report.write(settings, Results(runs, pd.DataFrame(), {})).read_text()
    early = runs[runs["method"] != "none"].assign(
        value=lambda frame: [rows[0]["success_rate"] for rows in frame["looks"]]
    )

    iqms = report.partition("## Interquartile means")[2]
    lora = early[(early["method"] == "lora") & (early["demonstrations"] == 5)]
    found = _cells(iqms, "LoRA")[0]
    assert found.startswith(f"{stats.trim_mean(lora['value'], 0.25):.2f} [")
    assert _cells(iqms, "pre-trained, zero-shot") == ["0.10"] * 4

    # by hand: strata are tasks, degrees of freedom by Welch and Satterthwaite, level corrected for 4 differences
    wide = early[early["demonstrations"] == 20].pivot(index="seed", columns=["method", "task"], values="value")
    differences = (wide["eva"] - wide["lora"]).to_numpy()  # (seeds, tasks)
    parts = differences.var(axis=0, ddof=1) / seeds / len(tasks) ** 2
    degrees = parts.sum() ** 2 / (parts**2 / (seeds - 1)).sum()
    half = stats.t.ppf(1 - 0.05 / 4 / 2, degrees) * math.sqrt(parts.sum())
    section = report.partition("### Differences, any step")[2]
    assert _cells(section, "EVA minus LoRA")[2] == f"{differences.mean():+.2f} ± {half:.2f}"

    by_task = report.partition("### Any step of the episode, 5 demonstrations")[2]
    hammer = runs[(runs["method"] == "lora") & (runs["demonstrations"] == 5) & (runs["task"] == "hammer-v3")]
    first = np.mean([rows[0]["success_rate"] for rows in hammer["looks"]])
    assert _cells(by_task, "LoRA")[1] == f"{first:.2f} → {hammer['success_rate'].mean():.2f}"
    assert "Success at any step, with EVA minus without: of 4 differences" in report


def test_the_config_that_is_shipped() -> None:
    settings = metaworld.parse([f"--config={CONFIG}"])
    assert set(settings.task_names) == set(CW10)
    assert settings.demonstrations == (5, 20)
    assert len(settings.look_steps) == 2
    assert settings.seeds >= 3
    # there is no other task to tune on
    assert len(MT40) + len(CW10) == 50
    assert not set(MT40) & set(CW10)
    cells = metaworld_comparison.MetaWorld(settings).cells()
    finals = [job for cell in cells for job in cell.final(cell.points[0] if cell.points else Point.of())]
    assert len(finals) == 2 * 10 + 7 * 10 * 2 * settings.seeds
    tuned = [job for cell in cells for point in cell.points for job in cell.tune(point)]
    assert not {job.settings.seed for job in tuned} & {job.settings.seed for job in finals}
    assert {job.settings.eval_episodes for job in tuned} == {0}
    assert len({job.id for job in (*finals, *tuned)}) == len(finals) + len(tuned)
    # all with the same goals
    assert len({(job.settings.seed if hasattr(job.settings, "code") and job.tags["method"] == "none"
                 else job.settings.eval_seed) for job in finals}) == 1  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--demonstrations=3,3", "--demonstrations must hold at least one value, and each once, got 3, 3"),
        ("--demonstrations=0", "--demonstrations must be a whole number of at least 1, got 0"),
        ("--demonstrations=9", "has 4 episodes of handle-press-side-v3, but 10 are needed"),
        ("--look-at=0", "--look-at must be a whole number of at least 1, got 0"),
        ("--tune-tasks=push-v2", "did you mean push-v3"),
        ("--tune-per=task", "--tune-tasks goes with one choice for all tasks, not with tune_per task"),
        ("--eval-episodes=0", "--zero-shot needs eval_episodes, which is 0"),
    ],
    ids=["twice", "none", "too-many", "look-at-0", "unknown-task", "both", "no-rollouts"],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"--tune-tasks={TASK}", change]
    assert metaworld.command_line(command(root, tmp_path / "bad", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bad").exists()
