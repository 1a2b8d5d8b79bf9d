"""The robot part of the demo runs end to end on tiny settings, resumes, and reports exactly what its runs gave."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from scipy import stats

from eva_lightning.rl import rendering
from eva_lightning.rl.collection import collect
from eva_lightning.rl.module import DecisionTransformerModule, save_weights
from eva_lightning.rl.trajectories import TrajectoryDataModule
from experiments import demo, demo_rl, demo_rl_runs
from experiments.demo_rl_runs import METHODS, Before, Config, Run, RunResult, Setup, Workplace
from experiments.demo_rl_summary import Success, rows

TASK = "handle-press-side-v3"


def _options(config: Path, out: Path, *more: str) -> list[str]:
    return ["--parts", "rl", "--workers", "0", "--rl-config", str(config), "--out", str(out), *more]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny settings, with a tiny network to start from."""
    folder = tmp_path_factory.mktemp("config")
    collect([TASK], 2, folder / "data", horizon=12, progress=False)
    torch.manual_seed(3)
    data = TrajectoryDataModule(folder / "data", [TASK], context=4, val_episodes=1)
    module = DecisionTransformerModule(**data.statistics, width=16, layers=2, heads=2, context=4)  # type: ignore[arg-type]
    checkpoint = save_weights(module, folder / "tiny.ckpt")
    content = {
        "setup": {
            "checkpoint": str(checkpoint), "tasks": ["handle-press-side"], "seeds": 2, "updates": 4, "batch_size": 4,
            "episodes": 2, "demonstrations": 2, "held_out": 1, "rank": 2, "horizon": 12, "film_size": 32,
        },
        "learning_rates": dict.fromkeys(METHODS, 1e-3),
    }  # fmt: skip
    path = folder / "demo_rl.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny demo has run once."""
    out = tmp_path_factory.mktemp("demo_rl")
    assert demo.main(_options(config, out)) == 0
    return out


def test_every_method_runs_and_the_page_shows_its_numbers(finished: Path) -> None:
    found = json.loads((finished / "results_rl.json").read_text(encoding="utf-8"))
    runs = found["runs"]
    assert sorted((r["run"]["method"], r["run"]["seed"]) for r in runs) == sorted(
        (m, s) for m in METHODS for s in (0, 1)
    )
    assert all(list(r["losses"]) == ["0", "1", "2", "3", "4"] for r in runs)
    starts = [r["losses"]["0"] for r in runs]
    assert starts == pytest.approx([starts[0]] * len(starts), rel=1e-4)
    assert all(len(r["successes"]) == len(r["returns"]) == 2 for r in [*runs, *found["before"]])
    assert {r["run"]["method"] for r in runs if r["ranks"]} == {"eva"}

    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    for method in METHODS:
        losses = [r["losses"]["4"] for r in runs if r["run"]["method"] == method]
        assert f"{np.mean(losses):.4f}<br>±{stats.sem(losses):.4f}" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    drawn = rendering.rendering_backend() is not None
    assert (finished / "before_after.gif").is_file() == ("data:image/gif;base64," in page) == drawn


def test_second_run_repeats_nothing_and_says_so(
    finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results_rl.json").read_text(encoding="utf-8")
    for name in ("collect_task", "measure_before", "finetune_run", "roll_one"):
        monkeypatch.setattr(demo_rl, name, None)
    assert demo.main(_options(config, finished)) == 0
    assert "Of 6 fine-tuning runs, 6 were finished before" in capsys.readouterr().out
    assert (finished / "results_rl.json").read_text(encoding="utf-8") == before


def test_interruption_keeps_what_is_finished_and_says_where_nothing_can_be_drawn(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = demo_rl_runs.finetune_run, []

    def interrupted(place: Workplace, run: Run) -> RunResult:
        if len(calls) == 1:
            # as killed half-way: a folder without its metrics
            place.run(run).mkdir(parents=True)
            (place.run(run) / "config.yaml").write_text("task: other")
            raise KeyboardInterrupt
        calls.append(run)
        return real(place, run)

    monkeypatch.setattr(demo_rl, "_why_no_film", lambda size: rendering.no_video_reason())
    monkeypatch.setattr(demo_rl, "finetune_run", interrupted)
    assert demo.main(_options(config, tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(demo_rl, "finetune_run", real)
    assert demo.main(_options(config, tmp_path)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Of 6 fine-tuning runs, 1 were finished before" in out
    assert "libegl1" in out
    assert "libegl1" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "before_after.gif").exists()
    names = ("losses", "successes", "returns", "ranks")
    (ours, theirs) = (
        [{n: r[n] for n in names} for r in json.loads((folder / "results_rl.json").read_text())["runs"]]
        for folder in (tmp_path, finished)
    )
    assert ours == theirs


def test_a_film_that_fails_costs_no_results(finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("the driver went away")

    settings = Config.read(config).setup
    place = Workplace(finished, settings)
    run = Run(TASK, "eva", 1e-3, 0, settings.episodes)
    monkeypatch.setattr(demo_rl, "roll_one", broken)
    assert demo_rl._make_film(place, run, None, Console(quiet=True)) == (None, "no video: the driver went away")


def test_tuning_writes_rates_that_the_demo_reads(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(yaml.safe_dump({"setup": yaml.safe_load(config.read_text())["setup"]}), encoding="utf-8")
    assert demo.main(_options(path, tmp_path, "--tune", "--rates", "1e-9", "1e-2")) == 0
    content = Config.read(path)
    scores = content.tuning["scores"]
    assert content.setup == Config.read(config).setup
    for method, row in scores.items():
        assert row[1e-9] == pytest.approx(1, abs=1e-4)
        assert content.learning_rates[method] == min(row, key=row.__getitem__)


def test_committed_configuration_is_tuned_apart_from_what_it_is_used_for() -> None:
    content = Config.read(demo.RL_CONFIG)
    setup = content.setup
    assert not set(content.tuning["seeds"]) & set(range(setup.seeds))
    assert content.tuning["demonstrations_seed"] != 0
    for method, rate in content.learning_rates.items():
        row = content.tuning["scores"][method]
        assert rate == min(row, key=row.__getitem__)


def test_shipped_checkpoint_is_small_and_says_what_it_knows() -> None:
    from eva_lightning.rl.module import read_checkpoint
    from eva_lightning.rl.tasks import MT40

    setup = Setup()
    assert setup.init.stat().st_size < 3_000_000
    found = read_checkpoint(setup.init)
    assert sorted(found["about"]["tasks"]) == sorted(MT40)
    assert not set(setup.tasks) & set(found["about"]["tasks"])
    assert {value.dtype for value in found["state_dict"].values()} == {torch.float16}
    assert setup.init.with_suffix(".md").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no configuration at"),
        ({"setup": {"task": ["push"]}}, "Did you mean|unknown setting"),
        ({"setup": {"tasks": ["push-v2"]}}, "push-v3"),
        ({"setup": {"seeds": 0}}, "setup.seeds must be at least 1, got 0"),
        ({"learning_rates": {"fft": 0}}, "learning_rates.fft must be a positive number, got 0"),
        (
            {"setup": {"checkpoint": "gone.ckpt"}, "learning_rates": dict.fromkeys(METHODS, 1.0)},
            "no checkpoint gone.ckpt",
        ),
    ],
)
def test_bad_configuration_is_named(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo_rl.yaml"
    if content is not None:
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert demo.main(_options(path, tmp_path / "out")) == 2
    assert re.search(message, " ".join(capsys.readouterr().out.split()))


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--parts", "vison"])
    assert "vision" in capsys.readouterr().err


def test_summary_agrees_with_scipy() -> None:
    def result(seed: int, loss: float, *solved: bool) -> RunResult:
        return RunResult(Run(TASK, "lora", 1e-3, seed, 2), {0: 1.0, 5: loss}, solved, (1.0, 3.0), 10, 1.0, {}, None)

    (row,) = rows([result(0, 0.4, True, False), result(1, 0.6, True, True)])
    assert (row.losses[5].mean, row.losses[5].error) == pytest.approx((0.5, stats.sem([0.4, 0.6])))
    assert (row.success.rate.mean, row.success.rate.error) == pytest.approx((0.75, stats.sem([0.5, 1.0])))
    assert row.success.count() == "3 of 4"
    assert row.curve(0.5, 1.0) == "█▁"
    one = Success.of([(True, False, False, False)])
    assert one.rate.error == pytest.approx((0.25 * 0.75 / 4) ** 0.5)


def test_filmed_goal_is_the_first_that_was_learnt() -> None:
    after = RunResult(Run(TASK, "eva", 1e-3, 0, 3), {0: 1.0}, (True, False, True), (), 1, 1.0, {}, None)
    assert demo_rl_runs.interesting_goal(Before(TASK, 0, (True, False, False), ()), after) == 2
    none = dataclasses.replace(after, successes=(False, False, False))
    assert demo_rl_runs.interesting_goal(Before(TASK, 0, (True, False, False), ()), none) == 0
