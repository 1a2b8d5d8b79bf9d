"""The demo runs end to end on tiny settings, resumes, and reports exactly what its runs gave."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from sklearn.datasets import load_digits

from eva_lightning.vision.digits import (
    PIXEL_MAX,
    PIXEL_MEAN,
    PIXEL_STD,
    DigitsDataModule,
    draw_labels,
    load_digits_split,
    random_shift,
)
from experiments import demo, demo_runs
from experiments.demo_runs import METHODS, Pretraining, Run, RunResult
from experiments.demo_summary import paired_differences, same_rate_sentences, summarise, verdict_sentence

TINY = [
    "--seeds",
    "2",
    "--parts",
    "vision",
    "--epochs",
    "2",
    "--labels",
    "40",
    "--pretrain-epochs",
    "1",
    "--workers",
    "0",
]


def _result(method: str, seed: int, loss: list[float], rate: float = 0.01) -> RunResult:
    return RunResult(Run(method, rate, seed), loss, [1 - value for value in loss], 100, 0.1, 1.0)


def _options(out: Path, *more: str) -> list[str]:
    return [*TINY, "--out", str(out), *more]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that a tiny tuning wrote."""
    folder = tmp_path_factory.mktemp("tuning")
    path = folder / "demo.yaml"
    more = ["--tune", "--rates", "1e-9", "1e-2", "--seeds", "1", "--config", str(path)]
    assert demo.main(_options(folder, *more)) == 0
    return path


@pytest.fixture(scope="module")
def config(tuned: Path) -> Path:
    """The same with rates at which two epochs teach something."""
    content = yaml.safe_load(tuned.read_text(encoding="utf-8"))
    content["learning_rates"] = dict.fromkeys(METHODS, 5e-3)
    path = tuned.with_name("usable.yaml")
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny demo has run once."""
    out = tmp_path_factory.mktemp("demo")
    assert demo.main(_options(out, "--config", str(config))) == 0
    return out


def test_demo_trains_every_method_and_writes_its_files(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert sorted((r["run"]["method"], r["run"]["learning_rate"], r["run"]["seed"]) for r in results) == sorted(
        [(method, 5e-3, seed) for method in METHODS for seed in (0, 1)]
        + [(method, 5e-4, seed) for method in METHODS if method != "full" for seed in (0, 1)]
    )
    assert all(len(r["loss"]) == 2 and all(map(math.isfinite, r["loss"])) for r in results)
    trained = {r["run"]["method"]: r["trainable_parameters"] for r in results}
    assert trained["lora"] == trained["eva_rho1"] < trained["full"] / 10
    ranks = {r["run"]["method"]: r["eva"].get("ranks", {}) for r in results}
    assert set(ranks["eva_rho1"].values()) == {4}
    assert sum(ranks["eva_rho2"].values()) == sum(ranks["eva_rho1"].values()) == 4 * 16
    assert ranks["full"] == ranks["lora"] == {}


def test_report_is_self_contained_and_shows_the_numbers_of_the_runs(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    # two minibatches may be too few for a convergence curve to have a point
    with_curve = any(any(curves.values()) for r in results if (curves := r["eva"].get("convergence")))
    assert page.count("data:image/svg+xml;base64,") == 11 + with_curve
    for method, rate in {(r["run"]["method"], r["run"]["learning_rate"]) for r in results}:
        runs = [r for r in results if r["run"]["method"] == method and r["run"]["learning_rate"] == rate]
        losses = [r["loss"][-1] for r in runs]
        assert f"{np.mean(losses):.3f} ±{stats.sem(losses):.3f}" in page
    assert "python -m experiments.demo --parts vision --seeds 2 --epochs 2 --labels 40 --pretrain-epochs 1" in page


def test_second_run_repeats_nothing_and_says_so(
    finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_text(encoding="utf-8")
    monkeypatch.setattr(demo, "pretrain", None)
    monkeypatch.setattr(demo, "finetune_to_file", None)
    assert demo.main(_options(finished, "--config", str(config))) == 0
    assert "Of 14 fine-tuning runs, 14 were finished before" in capsys.readouterr().out
    assert (finished / "results.json").read_text(encoding="utf-8") == before


def test_fresh_run_gives_the_same_numbers(finished: Path) -> None:
    path = next((finished / "runs").glob("eva_rho2-seed0-*.json"))
    first = demo_runs.load_result(path)
    assert first is not None
    weights = next((finished / "cache").glob("*.safetensors"))
    again = demo_runs.finetune(first.run, weights)
    assert (again.loss, again.accuracy, again.eva["ranks"]) == (first.loss, first.accuracy, first.eva["ranks"])


def test_ctrl_c_keeps_finished_runs(
    tmp_path: Path, finished: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in (finished / "cache").iterdir():
        (cache / file.name).write_bytes(file.read_bytes())
    real, calls = demo_runs.finetune_to_file, []

    def interrupted(run: Run, weights: Path, path: Path) -> RunResult:
        if calls:
            raise KeyboardInterrupt
        calls.append(run)
        return real(run, weights, path)

    monkeypatch.setattr(demo, "finetune_to_file", interrupted)
    assert demo.main(_options(tmp_path, "--config", str(config))) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert [path.name.split("-")[0] for path in (tmp_path / "runs").iterdir()] == ["full"]


@pytest.mark.slow
def test_processes_give_what_one_process_gives_and_surface_errors(finished: Path, config: Path, tmp_path: Path) -> None:
    weights = next((finished / "cache").glob("*.safetensors"))
    recipe = Pretraining(epochs=1)
    rate = demo.read_learning_rates(config)["lora"]
    run = Run("lora", rate, 1, n_labels=40, epochs=2)
    here = demo_runs.load_result(demo_runs.result_path(run, recipe, finished / "runs"))
    done: list[RunResult] = []
    with demo.worker_pool(1) as pool:
        demo.execute([(run, tmp_path / "run.json")], weights, pool, done.append)
        assert here is not None
        assert done[0].loss == here.loss
        with pytest.raises(RuntimeError, match="the run of LoRA with seed 1 failed"):
            demo.execute([(run, tmp_path / "run.json")], tmp_path / "missing.safetensors", pool, done.append)


def test_tuning_writes_the_configuration_that_the_demo_reads(tuned: Path) -> None:
    rates = demo.read_learning_rates(tuned)
    tuning = yaml.safe_load(tuned.read_text(encoding="utf-8"))["tuning"]
    for method, row in tuning["scores"].items():
        assert sorted(row) == [1e-9, 1e-2]
        assert rates[method] == max(row, key=lambda rate: (row[rate]["accuracy"], -row[rate]["loss"]))
        # A rate of nearly nothing leaves the zero head where it was: all five classes stay equally likely.
        assert row[1e-9]["loss"] == pytest.approx(math.log(5), abs=1e-3)


def test_committed_learning_rates_are_the_best_of_their_grid() -> None:
    content = yaml.safe_load(demo.CONFIG.read_text(encoding="utf-8"))
    tuning = content["tuning"]
    assert not set(tuning["seeds"]) & set(range(10))
    for method, rate in content["learning_rates"].items():
        row = tuning["scores"][method]
        assert rate == max(row, key=lambda r: (row[r]["accuracy"], -row[r]["loss"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no configuration at"), ("a: 1", "learning_rates.full must be"), ("learning_rates: {full: -1}", "got -1")],
)
def test_bad_configuration_is_named(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "demo.yaml"
    if text is not None:
        config.write_text(text, encoding="utf-8")
    assert demo.main(_options(tmp_path / "out", "--config", str(config))) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--seeds", "0"])
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="method must be one of full, lora"):
        Run("lara", 0.1, 0)


def test_result_keys_follow_settings_and_model() -> None:
    run, recipe = Run("lora", 0.01, 0), Pretraining()
    keys = {
        demo_runs.run_key(run, recipe),
        demo_runs.run_key(dataclasses.replace(run, seed=1), recipe),
        demo_runs.run_key(dataclasses.replace(run, learning_rate=0.02), recipe),
        demo_runs.run_key(run, Pretraining(epochs=1)),
    }
    assert len(keys) == 4
    assert demo_runs.run_key(run, recipe) in keys


def test_summary_agrees_with_scipy() -> None:
    losses = {"lora": [[1.0, 0.6], [1.2, 0.5], [0.9, 0.7]], "eva_rho1": [[0.8, 0.6], [1.1, 0.6], [0.6, 0.7]]}
    results = [_result(m, seed, loss) for m, rows in losses.items() for seed, loss in enumerate(rows)]
    rows = {row.method: row for row in summarise(results)}
    for method, values in losses.items():
        column = [row[0] for row in values]
        assert rows[method].loss[1].mean == pytest.approx(np.mean(column))
        assert rows[method].loss[1].error == pytest.approx(stats.sem(column))
    (difference,) = paired_differences(results)
    gaps = np.array(losses["eva_rho1"])[:, 0] - np.array(losses["lora"])[:, 0]
    assert (difference.loss[1].mean, difference.loss[1].error) == pytest.approx((gaps.mean(), stats.sem(gaps)))
    assert difference.wins == {1: 3, 2: 0}
    assert difference.verdict(1) == "ahead"
    assert difference.verdict(2) == "no clear difference"
    assert "3 paired seeds: ahead after epoch 1; no clear difference after epoch 2." in verdict_sentence(difference)


def test_pairs_use_common_seeds_only_and_one_seed_decides_nothing() -> None:
    results = [_result("lora", 0, [1.0]), _result("lora", 1, [9.0]), _result("eva_rho2", 0, [0.5])]
    (difference,) = paired_differences(results)
    assert difference.n_pairs == 1
    assert difference.loss[1].mean == pytest.approx(-0.5)
    assert difference.verdict(1) == "undecided (one seed)"
    assert paired_differences(results[2:]) == []


def test_equal_rates_are_counted_where_both_methods_have_them() -> None:
    def row(*losses: float) -> dict[float, dict[str, float]]:
        return {10.0**-i: {"early_loss": loss, "loss": 2 * loss} for i, loss in enumerate(losses)}

    scores = {"lora": row(0.5, 0.6, 0.7), "eva_rho2": row(0.4, 0.6)}
    (sentence,) = same_rate_sentences({"scores": scores, "early_epoch": 3, "epochs": 10})
    assert "EVA ρ=2 has a lower mean loss than LoRA at 1 of 2 rates after epoch 3 and at 1 of 2 after" in sentence
    assert same_rate_sentences({}) == []


def test_digit_parts_are_disjoint_and_are_the_scans_of_scikit_learn() -> None:
    classes = (5, 6, 7, 8, 9)
    split = load_digits_split(classes)
    bunch = load_digits()
    parts = [part.tensors for part in (split.train, split.tune, split.test)]
    images = torch.cat([images for images, _ in parts])
    pixels = ((images * PIXEL_STD + PIXEL_MEAN) * PIXEL_MAX).round().squeeze(1).numpy()
    labels = torch.cat([labels for _, labels in parts]).numpy() + 5
    ours = sorted((label, image.tobytes()) for label, image in zip(labels, pixels.astype("f8"), strict=True))
    kept = np.isin(bunch.target, classes)
    theirs = sorted((t, i.tobytes()) for t, i in zip(bunch.target[kept], bunch.images[kept], strict=True))
    assert ours == theirs
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_labels_are_balanced_and_follow_the_seed() -> None:
    pool = load_digits_split((5, 6, 7, 8, 9)).train
    images, labels = draw_labels(pool, 52, seed=3).tensors
    assert labels.bincount().tolist() == [11, 11, 10, 10, 10]
    assert torch.equal(images, draw_labels(pool, 52, seed=3).tensors[0])
    assert not torch.equal(images, draw_labels(pool, 52, seed=4).tensors[0])


def test_batch_order_ignores_the_global_generator() -> None:
    def labels() -> list[int]:
        return [int(y) for _, batch in DigitsDataModule(n_labels=40, seed=1).train_dataloader() for y in batch]

    torch.manual_seed(0)
    first = labels()
    torch.rand(5)
    assert labels() == first


def test_shift_moves_the_image_by_whole_pixels() -> None:
    torch.manual_seed(0)
    images = torch.full((64, 1, 8, 8), -PIXEL_MEAN / PIXEL_STD)
    images[:, 0, 4, 3] = 1.0
    shifted = random_shift(images)
    places = {(int(r), int(c)) for _, _, r, c in (shifted == 1.0).nonzero()}
    assert (shifted == 1.0).sum() == 64
    assert places == {(r, c) for r in (3, 4, 5) for c in (2, 3, 4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_digits_split((5, 5)), "distinct digits"),
        (lambda: load_digits_split((5, 11)), "distinct digits"),
        (lambda: load_digits_split((5,), 0.5, 0.5), "stay below 1"),
        (lambda: DigitsDataModule(evaluate_on="train"), "'test' or 'tune', got 'train'"),
        (lambda: DigitsDataModule(n_labels=4), "at least the number of classes, 5, got 4"),
        (lambda: DigitsDataModule(n_labels=5000), "n_labels=5000 asks for 1000 images"),
    ],
)
def test_bad_data_settings_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
