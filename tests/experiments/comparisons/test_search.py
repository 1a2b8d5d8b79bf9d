"""The search over learning rates, ranks and ρ: the paper's configuration, and the whole path on a tiny network."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from eva_lightning.sealed import read_sealed_json
from experiments.comparisons import metaworld, metaworld_comparison
from experiments.comparisons.settings import Part
from experiments.metaworld import table
from experiments.runner.jobs import Job, Point
from experiments.runner.lightning_runs import trainer_precision
from experiments.runner.results import Results
from experiments.runner.run_folder import Work
from experiments.runner.yaml_files import read_yaml
from tests.eva_lightning.rl.tiny import TASK, make_robot
from tests.paths import ROOT

CONFIG = ROOT / "configs" / "metaworld" / "finetune_paper.yaml"

#: Typed from the paper's text: section -> settings.
PAPER: dict[str, dict[str, Any]] = {
    "4.1": {"alpha": 1},
    "E.1": {"horizon": 200},
    "E.2": {
        "max_steps": 100_000, "batch_size": 128, "context": 50, "warmup_steps": 4000, "min_lr": 1e-6,
        "weight_decay": 0.01, "gradient_clip": 0.25, "dropout": 0.2, "target_return": None, "bias": "none",
        "target_modules": None,
    },
    "E.3": {"ranks": (2, 4, 8, 16)},
    "G": {"rhos": (1, 2)},
    "Tables 23 and 24": {"seeds": 3},
}  # fmt: skip
GLUE_RATES = ({1e-3, 4e-4, 1e-4}, {4e-3, 1e-3, 4e-4})
CW10 = (
    "hammer", "push-wall", "faucet-close", "push-back", "stick-pull", "handle-press-side", "push", "shelf-place",
    "window-close", "peg-unplug-side",
)  # fmt: skip
TABLE_23 = ("FFT", "LoRA", "AdaLoRA", "PiSSA", "OLoRA", "EVA", "DoRA", "EVA+DoRA")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations of one task and a pre-trained network, both tiny."""
    folder = tmp_path_factory.mktemp("search")
    return make_robot(folder, layers=1)


def shrunk(root: Path, output: Path, *more: str) -> list[str]:
    """The paper's configuration on a tiny network: two methods, ranks and learning rates."""
    options = {
        "config": CONFIG, "init": root / "init.ckpt", "data": root / "data", "output": output, "tasks": TASK,
        "methods": "lora,eva", "ranks": "2,4", "grid": "1e-2,1e-3", "rhos": "1,2", "seeds": 1, "tune-seeds": 1,
        "train-episodes": 3, "val-episodes": 1, "max-steps": 3, "tune-steps": 2, "batch-size": 4, "val-at": "1",
        "eval-episodes": 1, "horizon": 3, "context": 4, "workers": 0, "threads": 1, "progress": "false",
        "accelerator": "cpu",
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def run(line: list[str]) -> Results:
    return metaworld.main(line)


def test_the_papers_configuration_is_what_its_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = metaworld.parse([f"--config={CONFIG}"])
    for section, values in PAPER.items():
        assert {name: getattr(settings, name) for name in values} == values, section
    assert set(settings.grid) == GLUE_RATES[0] | GLUE_RATES[1]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    assert trainer_precision(settings.precision, settings.accelerator) == "bf16-mixed"
    assert settings.train_episodes is not None
    assert settings.train_episodes * settings.horizon == 2_000_000
    assert set(settings.task_names) == {f"{task}-v3" for task in CW10}
    assert set(settings.labels.values()) == set(TABLE_23)
    # means over three seeds in steps of 1/30
    assert settings.seeds * settings.eval_episodes == 30
    assert settings.tune_steps == settings.max_steps
    # every run is handed all of it
    single = settings.run(Part("eva", rank=16), "final", Point.of(lr=1e-3, rho=1.0), 2, "push-v3")
    for name, value in {**PAPER["4.1"], **PAPER["E.1"], **PAPER["E.2"]}.items():
        assert getattr(single, name) == value, name
    assert (single.rank, single.rho, single.lr, single.first_seed, single.seeds) == (16, 1.0, 1e-3, 2, 1)
    assert "4000 linear warm-up" in CONFIG.read_text()
    assert set(read_yaml(CONFIG)) >= {name for values in PAPER.values() for name in values} - {"bias", "target_modules"}


def test_the_papers_search_has_every_method_at_every_rank() -> None:
    settings = metaworld.parse([f"--config={CONFIG}"])
    ranks = Counter((part.method, part.task) for part in settings.parts)
    assert set(ranks) == {(method, f"{task}-v3") for method in settings.labels for task in CW10}
    assert all(number == (1 if method == "fft" else 4) for (method, _), number in ranks.items())
    tuned = Counter(dict.fromkeys(settings.labels, 0))
    for part in settings.parts:
        tuned[part.method] += len(settings.points(part)) * settings.tune_seeds
    # 10 tasks x 4 learning rates x 3 seeds, by 4 ranks, by 2 ρ
    assert tuned == {
        "fft": 120, **dict.fromkeys(("lora", "dora", "adalora", "olora", "pissa"), 480), "eva": 960, "eva-dora": 960,
    }  # fmt: skip


def test_the_paper_took_the_best_rank_of_each_task_by_success() -> None:
    printed = pd.read_csv(ROOT / "experiments" / "metaworld" / "paper_tables.csv", comment="#")
    printed = printed[(printed["task"] != "average") & (printed["method"] != "fft")]
    best = printed[printed["table"] == 24].groupby(["method", "task"])["success"].max()
    reported = printed[printed["table"] == 23].set_index(["method", "task"])["success"]
    assert len(reported) == 70
    differ = [place for place in reported.index if reported[place] != best[place]]
    assert differ == [("pissa", "push-back-v3")]


@pytest.mark.slow
def test_the_whole_search_resumes_and_its_choices_are_the_best(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, build, begun = shrunk(root, tmp_path), metaworld_comparison.build, iter(range(100))

    def power_cut(job: Job) -> Work:
        if next(begun) == 7:
            raise KeyboardInterrupt
        return build(job)

    with monkeypatch.context() as patched:
        patched.setattr(metaworld_comparison, "build", power_cut)
        with pytest.raises(KeyboardInterrupt):
            run(line)
    assert len(list(tmp_path.glob("*/*/metrics.json"))) == 7
    results = run(line)
    assert ": 7 done, 0 failed" in capsys.readouterr().out
    # LoRA: 2 ranks x 2 rates, EVA: x 2 ρ; then one for each method and rank
    assert (len(results.tuning), len(results.runs)) == (12, 4)
    assert results.is_complete
    assert set(results.runs["precision"]) == {"32-true"}  # on a CPU

    # the choice, independently, from what lies on the disk
    tuned = [read_sealed_json(file) for file in (tmp_path / "tuning").glob("*/metrics.json")]
    place = lambda metrics: (metrics["method"], metrics["rank"])  # noqa: E731
    for (method, rank), group in groupby(sorted(tuned, key=place), place):
        best = min(group, key=lambda m: (-m["final_success_rate"], m["val_loss"][-1]["val_loss"]))
        final = results.runs[(results.runs["method"] == method) & (results.runs["rank"] == rank)]
        assert set(final["lr"]) == {best["lr"]}
        assert set(final["rho"].dropna()) == ({best["rho"]} if method == "eva" else set())
        assert list(final["seed"]) == [0]
        choice = read_sealed_json(tmp_path / "choices.json")[f"{TASK}, {method}, rank {rank}"]
        assert choice["score"][1] == pytest.approx(math.log(best["val_loss"][-1]["val_loss"]))

    candidates = pd.read_csv(tmp_path / "choices.csv")
    assert len(candidates) == 12
    assert candidates["chosen"].sum() == 4
    report = (tmp_path / "report.md").read_text()
    assert "## Chosen settings" in report
    assert f"| EVA (r=4), {TASK}" in report
    assert "## Success by rank, at its last step" in report
    # tables of runs have no tuning runs, and one line of EVA for each rank, whatever its ρ
    text = str(table.main(["--runs", str(tmp_path)]))
    assert all(
        f"**ours** {label}, any step" in text for label in ("LoRA (r=2)", "LoRA (r=4)", "EVA (r=2)", "EVA (r=4)")
    )
    assert "**ours** EVA (ρ" not in text
    # finished: nothing is run
    monkeypatch.setattr(metaworld_comparison, "build", power_cut)
    assert len(run([*line, "--report"]).runs) == 4


def test_one_choice_for_all_tasks_and_ranks_where_that_is_asked_for() -> None:
    axes = ["--ranks=4,2", "--rhos=1,2", "--grid=1e-3", "--grids={fft: [1e-4, 1e-5]}"]
    settings = metaworld.parse(["--init=x", "--methods=fft,lora,eva,eva:2", *axes])
    assert [part.name for part in settings.parts] == ["fft", "lora", "eva", "eva:2"]
    assert [list(map(str, settings.points(part))) for part in settings.parts] == [
        ["lr 1e-05", "lr 0.0001"],
        ["lr 0.001, rank 2", "lr 0.001, rank 4"],
        [f"lr 0.001, rank {rank}, rho {rho}" for rank in (2, 4) for rho in (1, 2)],
        ["lr 0.001, rank 2", "lr 0.001, rank 4"],
    ]
    assert list(settings.labels.values()) == ["FFT", "LoRA", "EVA", "EVA (ρ = 2)"]
    # a learning rate that is given is not tuned, but rank and ρ are
    given = metaworld.parse(["--init=x", "--methods=lora,eva", "--rates=eva=0.01,lora=0.02", "--ranks=2,4"])
    assert [[point.get("lr") for point in given.points(part)] for part in given.parts] == [[0.02] * 2, [0.01] * 2]
    cells = metaworld_comparison.MetaWorld(given).cells()
    assert [cell.given for cell in cells] == [None, None]


def test_folders_of_comparisons_made_before_there_was_a_search_are_found_again() -> None:
    settings = metaworld.parse(["--init=nowhere.ckpt", "--tasks=push", "--methods=scratch,eva:1,eva"])
    names = []
    for cell in metaworld_comparison.MetaWorld(settings).cells():
        names += [cell.tune(cell.points[0])[0].path.name, cell.final(cell.points[-1])[0].path.name]
    assert names == [
        "push-v3-From-scratch-lr-0.0003-seed-100-f5f6914a", "push-v3-From-scratch-lr-0.03-seed-0-049c3fc2",
        "push-v3-EVA-rho1-lr-0.0003-seed-100-357ca6ea", "push-v3-EVA-rho1-lr-0.03-seed-0-f9f0f5f7",
        "push-v3-EVA-lr-0.0003-seed-100-41f467c1", "push-v3-EVA-lr-0.03-seed-0-61da61e2",
    ]  # fmt: skip


def test_choices_by_success_are_made_on_goals_that_the_result_does_not_use() -> None:
    settings = metaworld.parse(["--init=x", "--select=success", "--eval-episodes=10"])
    tune, final = (settings.run(Part("lora"), phase, Point.of(lr=1e-3), 0, "push-v3") for phase in ("tune", "final"))
    assert (tune.eval_seed, final.eval_seed) == (100, 0)
    assert (tune.eval_episodes, final.eval_episodes) == (10, 10)
    score = metaworld_comparison.MetaWorld(settings).score
    metrics = {"val_loss": [{"val_loss": 1.0}], "success_rate": 0.5, "final_success_rate": 0.25}
    assert score(metrics) == (-0.5, 0.0)
    assert score({**metrics, "success_rate": None}) == (math.inf, 0.0)


def test_the_plan_needs_neither_checkpoint_nor_demonstrations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # of so few windows that a step of the paper's network takes no time here
    small = ("--batch-size=1", "--context=2", "--eval-episodes=1", "--horizon=2", "--select=loss", "--methods=eva")
    assert run([f"--config={CONFIG}", "--plan", "--threads=1", *small]).runs.empty
    printed = capsys.readouterr().out
    assert "tuning: 960 runs, 0 of them finished" in printed
    assert "final: 120 runs, 0 of them finished" in printed
    assert "checkpoint: MISSING: there is no checkpoint runs/pretrain_paper/weights.ckpt" in printed
    assert "demonstrations: MISSING: " in printed
    assert "timed with an untrained network of the paper's size" in printed
    assert "eva             960 tuning +  120 final runs,   8 points" in printed
    assert "at the paper's speed, about an A100-hour per 100,000 steps: 1,080 A100-hours" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--ranks=2,2", "--ranks must hold at least one value, and each once, got 2, 2"),
        ("--ranks=0", "--ranks must be a whole number of at least 1, got 0"),
        ("--rhos=0.5", "--rhos must be a number of at least 1, got 0.5"),
        ("--tune-per=seed", "unknown tune per 'seed': choose from task, rank"),
        ("--tune-per=rank", "--tune-per rank goes with ranks, which are not given"),
        ("--select=return", "unknown select 'return'"),
        ("--grids={loraa: [0.1]}", "unknown method 'loraa': did you mean lora"),
        ("--grids={lora: [-0.1]}", "--grids must be a number above 0, got -0.1"),
        ("--grids={lora: fast}", "--grids must be a mapping"),
        ("--gpus-per-run=-1", "--gpus-per-run must be a number of at least 0, got -1"),
        ("--precision=fp8", "unknown precision 'fp8'"),
        ("--logger=wand", "unknown logger 'wand'"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert metaworld.command_line(["--init=x", f"--output={tmp_path / 'bad'}", change]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_success_cannot_be_chosen_by_without_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert metaworld.command_line(["--init=x", "--select=success", "--eval-episodes=0"]) == 2
    assert "--select success needs eval_episodes, which is 0" in capsys.readouterr().err


def test_gpus_are_used_where_runs_may_have_them() -> None:
    assert not metaworld.parse(["--init=x"]).uses_gpus
    assert metaworld.parse(["--init=x", "--accelerator=auto"]).uses_gpus
    assert not metaworld.parse(["--init=x", "--accelerator=gpu", "--gpus-per-run=0"]).uses_gpus
