"""Runs of the digits comparison: what tells them apart, and that they can be repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from experiments.comparisons import digits, digits_run
from experiments.comparisons.digits_run import RunSettings, finetune, pretrain_once, pretrained_folder, weights_in
from experiments.runner.run_folder import RunFolder
from experiments.runner.tuning import Point, choose
from tests.paths import CONFIGS


def test_the_same_settings_give_the_same_numbers(tmp_path: Path) -> None:
    model = pretrained_folder(tmp_path, 1)
    assert pretrain_once(model) == pretrain_once(model)
    settings = RunSettings(method="eva", lr=5e-3, seed=1, weights=str(weights_in(model)), labels=40, epochs=2)
    first, again = (finetune(settings, RunFolder(tmp_path, settings)) for _ in range(2))
    for name in ("loss", "accuracy"):
        assert first[name] == again[name]
    assert first["eva"]["ranks"] == again["eva"]["ranks"]


def test_identity_follows_settings_model_and_code() -> None:
    def weights(epochs: int) -> str:
        return str(weights_in(pretrained_folder("out", epochs)))

    settings = RunSettings(method="lora", lr=0.01, seed=0, weights=weights(30), code="a")
    others = [
        replace(settings, seed=1),
        replace(settings, lr=0.02),
        replace(settings, weights=weights(1)),
        replace(settings, code="b"),
    ]
    ids = {RunFolder("", each).id for each in (settings, *others)}
    assert len(ids) == 5
    moved = replace(settings, weights=settings.weights.replace("out", "elsewhere"))
    assert RunFolder("", moved).id == RunFolder("", settings).id


def test_a_rate_that_both_comparisons_have_is_run_once() -> None:
    rates = {"fft": 1e-3, "lora": 3e-2, "eva:1": 3e-3, "eva": 3e-2}
    comparison = digits.Digits(digits.Settings(learning_rates=rates, seeds=1, workers=0))
    jobs = [job for cell in comparison.cells() if cell.given for job in cell.final(cell.given)]
    assert len({job.id for job in jobs}) == len(jobs) == 4 + 2


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'lara': did you mean"):
        RunSettings(method="lara", lr=0.1, seed=0, weights="w")


def test_committed_learning_rates_are_the_best_of_their_grid() -> None:
    content = yaml.safe_load((CONFIGS / "digits.yaml").read_text(encoding="utf-8"))
    tuning = content["tuning"]
    assert not set(tuning["seeds"]) & set(range(10))
    assert set(content["learning_rates"]) == set(digits.METHODS)
    for method, lr in content["learning_rates"].items():
        rows = [row for row in tuning["scores"] if row["method"] == method]
        assert lr == min(rows, key=lambda row: (row["loss"], -row["accuracy"]))["lr"]


def test_score_prefers_loss_then_accuracy() -> None:
    comparison = digits.Digits(digits.Settings(tune="unused.yaml"))
    metrics = {
        1e-3: {"accuracy": [0.1, 0.8], "loss": [2.0, 0.4]},
        1e-2: {"accuracy": [0.5, 0.9], "loss": [1.0, 0.4]},
        1e-1: {"accuracy": [0.9, 0.95], "loss": [0.1, 0.5]},
    }
    choice = choose({Point.of(lr=lr): [comparison.score(each)] for lr, each in metrics.items()})
    assert choice is not None
    assert choice.point.get("lr") == 1e-2


def test_runs_are_made_by_this_code() -> None:
    assert digits_run.code_of_runs() == digits_run.code_of_runs() != ""
