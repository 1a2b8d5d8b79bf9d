"""The demo runs end to end on tiny settings, resumes, and reports exactly what its runs gave."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from eva_lightning.rl import rendering
from experiments import demo
from experiments.comparisons import digits, digits_run, robots, robots_film
from experiments.metaworld import before_run, finetune_run
from experiments.runner.run_folder import RunFolder
from tests.eva_lightning.rl.tiny import make_robot

DIGITS = ["--parts=digits", "--seeds=2", "--epochs=2", "--labels=40", "--pretrain-epochs=1", "--workers=0"]
RL = ["--parts=rl", "--workers=0"]
RATES = dict.fromkeys({*digits.METHODS, *robots.METHODS}, 1e-3)


def _half(values: Any) -> float:
    """Half the width of the 95% interval of the mean."""
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    return float(high - low) / 2


def _results(out: Path, part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / part / "results.json").read_text(encoding="utf-8"))
    return found


# The digits, which take the place of photographs where no weights can be had.


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that a tiny tuning wrote."""
    folder = tmp_path_factory.mktemp("tuning")
    path = folder / "demo.yaml"
    more = ["--tune", "--rates=1e-9,1e-2", "--seeds=1", f"--digits-config={path}", f"--out={folder}"]
    assert demo.main([*DIGITS, *more]) == 0
    return path


@pytest.fixture(scope="module")
def config(tuned: Path) -> Path:
    """The same with rates at which two epochs teach something."""
    content = yaml.safe_load(tuned.read_text(encoding="utf-8"))
    content["learning_rates"] = dict.fromkeys(digits.METHODS, 5e-3)
    path = tuned.with_name("usable.yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the digits have run once."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main([*DIGITS, f"--digits-config={config}", f"--out={out}"]) == 0
    return out


def test_every_method_trains_on_the_same_budget(finished: Path) -> None:
    results = _results(finished, "digits")
    adapters = [method for method in digits.METHODS if method != "fft"]
    assert sorted((r["method"], r["lr"], r["seed"]) for r in results) == sorted(
        [(method, 5e-3, seed) for method in digits.METHODS for seed in (0, 1)]
        + [(method, 5e-4, seed) for method in adapters for seed in (0, 1)]
    )
    assert all(len(r["loss"]) == 2 and all(map(math.isfinite, r["loss"])) for r in results)
    trained = {r["method"]: r["trainable_parameters"] for r in results}
    assert trained["lora"] == trained["eva:1"] < trained["fft"] / 10
    ranks = {r["method"]: r["eva"].get("ranks", {}) for r in results}
    assert set(ranks["eva:1"].values()) == {4}
    assert sum(ranks["eva"].values()) == sum(ranks["eva:1"].values()) == 4 * 16
    assert ranks["fft"] == ranks["lora"] == {}


def test_report_is_self_contained_and_shows_the_numbers_of_the_runs(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    results = _results(finished, "digits")
    # two minibatches may be too few for a convergence curve to have a point
    eva = next(r for r in results if (r["method"], r["seed"], r["lr"]) == ("eva", 0, 5e-3))["eva"]
    assert page.count("data:image/svg+xml;base64,") == 11 + any(eva["convergence"].values())
    for method, lr in {(r["method"], r["lr"]) for r in results}:
        losses = [r["loss"][-1] for r in results if (r["method"], r["lr"]) == (method, lr)]
        assert f"{np.mean(losses):.3f} ± {_half(losses):.3f}" in page
    assert "python -m experiments.demo --parts digits --seeds 2 --epochs 2 --labels 40 --pretrain-epochs 1" in page


def test_second_call_repeats_nothing_and_says_so(
    finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _results(finished, "digits")
    monkeypatch.setattr(digits_run, "pretrain", None)
    monkeypatch.setattr(digits_run, "finetune", None)
    assert demo.main([*DIGITS, f"--digits-config={config}", f"--out={finished}"]) == 0
    assert "14 done, 0 failed, 0 to do" in capsys.readouterr().out
    assert _results(finished, "digits") == before
    assert "14 of them finished by an earlier call" in (finished / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_keeps_finished_runs(
    tmp_path: Path, finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (model,) = (finished / "digits").glob("pretrained-*")
    shutil.copytree(model, tmp_path / "digits" / model.name)
    real, calls = digits_run.finetune, []

    def interrupted(settings: digits_run.RunSettings, folder: RunFolder) -> dict[str, Any]:
        if calls:
            raise KeyboardInterrupt
        calls.append(settings)
        return real(settings, folder)

    monkeypatch.setattr(digits_run, "finetune", interrupted)
    assert demo.main([*DIGITS, f"--digits-config={config}", f"--out={tmp_path}"]) == 130
    assert "Finished runs are kept; rerun to resume" in capsys.readouterr().out
    assert len(list((tmp_path / "digits" / "runs").glob("*/metrics.json"))) == 1


def test_fresh_deletes_what_is_there(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "copy")

    def interrupted(settings: digits_run.PretrainingSettings, folder: RunFolder) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_run, "pretrain", interrupted)
    assert demo.main([*DIGITS, "--fresh", f"--digits-config={config}", f"--out={tmp_path / 'copy'}"]) == 130
    assert not list((tmp_path / "copy" / "digits").rglob("metrics.json"))


@pytest.mark.slow
def test_processes_give_what_one_process_gives(finished: Path, config: Path, tmp_path: Path) -> None:
    more = [f"--digits-config={config}", f"--out={tmp_path}", "--seeds=1", "--workers=2"]
    assert demo.main([*DIGITS, *more]) == 0
    here = {r["id"]: r["loss"] for r in _results(finished, "digits")}
    there = _results(tmp_path, "digits")
    assert len(there) == 7
    assert all(here[r["id"]] == r["loss"] for r in there)


def test_tuning_writes_the_configuration_that_the_demo_reads(tuned: Path) -> None:
    content = yaml.safe_load(tuned.read_text(encoding="utf-8"))
    rows = content["tuning"]["scores"]
    for method in digits.METHODS:
        mine = {row["lr"]: row for row in rows if row["method"] == method}
        assert sorted(mine) == [1e-9, 1e-2]
        best = min(mine, key=lambda lr, mine=mine: (mine[lr]["loss"], -mine[lr]["accuracy"]))  # type: ignore[misc]
        assert content["learning_rates"][method] == best
        # A rate of nearly nothing leaves the zero head where it was: all five classes stay equally likely.
        assert mine[1e-9]["loss"] == pytest.approx(math.log(5), abs=1e-3)


# The second part.


@pytest.fixture(scope="module")
def rl_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny settings, with a tiny network to start from."""
    folder = tmp_path_factory.mktemp("config")
    make_robot(folder, episodes=2, horizon=12)
    checkpoint = folder / "init.ckpt"
    content = {
        "checkpoint": str(checkpoint), "tasks": ["handle-press-side"], "seeds": 2, "updates": 4, "batch_size": 4,
        "episodes": 2, "demonstrations": 2, "held_out": 1, "rank": 2, "horizon": 12, "film_size": 32,
        "learning_rates": dict.fromkeys(robots.METHODS, 1e-3),
    }  # fmt: skip
    path = folder / "demo_rl.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rl_finished(rl_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the second part has run once."""
    out = tmp_path_factory.mktemp("demo_rl")
    assert demo.main([*RL, f"--rl-config={rl_config}", f"--out={out}"]) == 0
    return out


def test_every_method_is_rolled_out_and_the_page_shows_its_numbers(rl_finished: Path) -> None:
    results = _results(rl_finished, "rl")
    runs = [r for r in results if r["method"] != "none"]
    methods = [*robots.METHODS, "none"]
    assert sorted((r["method"], r["seed"]) for r in results) == sorted((m, s) for m in methods for s in (0, 1))
    assert all([entry["updates"] for entry in r["val_loss"]] == [0, 1, 2, 3, 4] for r in runs)
    starts = [r["val_loss"][0]["val_loss"] for r in runs]
    assert starts == pytest.approx([starts[0]] * len(starts), rel=1e-4)
    assert all(len(r["successes"]) == len(r["returns"]) == 2 for r in results)
    assert {r["method"] for r in runs if r["ranks"]} == {"eva"}

    page = (rl_finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for method in robots.METHODS:
        losses = [r["val_loss"][-1]["val_loss"] for r in runs if r["method"] == method]
        assert f"{np.mean(losses):.4f}<br><small>± {_half(losses):.4f}</small>" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    drawn = rendering.rendering_backend() is not None
    assert (rl_finished / "rl" / "before_after.gif").is_file() == ("data:image/gif;base64," in page) == drawn


def test_second_call_of_the_second_part_repeats_nothing(
    rl_finished: Path, rl_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _results(rl_finished, "rl")
    monkeypatch.setattr(robots, "collect", None)
    monkeypatch.setattr(robots_film, "roll_one", None)
    monkeypatch.setattr(before_run, "evaluate", None)
    monkeypatch.setattr(finetune_run, "build", None)
    assert demo.main([*RL, f"--rl-config={rl_config}", f"--out={rl_finished}"]) == 0
    assert "8 done, 0 failed, 0 to do" in capsys.readouterr().out
    assert _results(rl_finished, "rl") == before


def test_interruption_resumes_and_a_machine_that_cannot_draw_says_so(
    rl_finished: Path,
    rl_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = finetune_run.build, []

    def interrupted(settings: Any) -> Any:
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(settings)

    monkeypatch.setattr(robots_film, "rendering_backend", lambda: None)
    monkeypatch.setattr(finetune_run, "build", interrupted)
    command = [*RL, f"--rl-config={rl_config}", f"--out={tmp_path}"]
    assert demo.main(command) == 130
    monkeypatch.setattr(finetune_run, "build", real)
    assert demo.main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    # of seed 0: the rollouts before fine-tuning and one run
    assert "2 done, 0 failed, 6 to do" in out
    assert "libegl1" in out
    assert "libegl1" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "rl" / "before_after.gif").exists()
    names = ("val_loss", "successes", "returns", "ranks")
    ours, theirs = (
        [{name: r[name] for name in names} for r in _results(folder, "rl")] for folder in (tmp_path, rl_finished)
    )
    assert ours == theirs


def test_tuning_of_the_second_part_keeps_its_settings(rl_config: Path, tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    known = yaml.safe_load(rl_config.read_text())
    settings = {name: value for name, value in known.items() if name != "learning_rates"}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert demo.main([*RL, "--tune", "--rates=1e-9,1e-2", f"--rl-config={path}", f"--out={tmp_path}"]) == 0
    content = yaml.safe_load(path.read_text())
    assert {name: content[name] for name in settings} == settings
    for method in robots.METHODS:
        mine = {row["lr"]: row["loss_left"] for row in content["tuning"]["scores"] if row["method"] == method}
        assert mine[1e-9] == pytest.approx(1, abs=1e-4)
        assert content["learning_rates"][method] == min(mine, key=mine.__getitem__)


# The command.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds must be a whole number of at least 1, got 0"),
        (["--parts", "vison"], "unknown part 'vison': did you mean vision"),
        (["--epoch", "3"], "unknown option '--epoch': did you mean --epochs"),
        (["--rates", "0"], "--rates must be a number above 0"),
    ],
)
def test_bad_options_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("digits", None, "no configuration at"),
        ("digits", {"a": 1}, "unknown setting 'a'"),
        ("digits", {"seeds": 3}, "learning_rates are not given"),
        ("digits", {"learning_rates": {"lora": 1.0}}, "learning_rates.fft must be a number above 0, got None"),
        ("digits", {"learning_rates": {"fft": -1.0}}, "learning_rates.fft must be a number above 0, got -1.0"),
        ("digits", {"learning_rates": RATES, "tuning": {"scores": 3}}, "tuning must have a rule, seeds, and scores"),
        ("rl", {"learning_rates": RATES, "tuning": {"scores": [3]}}, "tuning must have a rule, seeds, and scores"),
        ("rl", {"task": ["push"]}, "unknown setting 'task': did you mean tasks"),
        ("rl", {"tasks": ["push-v2"]}, "push-v3"),
        ("rl", {"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        (
            "rl",
            {"checkpoint": "gone.ckpt", "learning_rates": dict.fromkeys(robots.METHODS, 1.0)},
            "no checkpoint gone.ckpt",
        ),
    ],
)
def test_bad_configuration_is_named(
    part: str, content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert demo.main([f"--parts={part}", f"--{part}-config={path}", f"--out={tmp_path / 'out'}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
