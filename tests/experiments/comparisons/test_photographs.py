"""The comparison on photographs from end to end, on a tiny network with random weights and a folder of noise."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from eva_lightning.errors import InputError, UnreachableError
from eva_lightning.vision.data.splits import open_task
from experiments import demo
from experiments.comparisons import digits, photographs_run
from experiments.comparisons.photographs import Photographs
from experiments.comparisons.photographs_samples import samples
from experiments.comparisons.photographs_settings import OneRun, Settings
from experiments.report import page
from experiments.runner import comparison as runner
from experiments.runner.run_folder import RunFolder
from tests.paths import CONFIGS, ROOT
from tools import dinov2_small
from tools.dinov2_small import FoundWeights

ORIGIN = "random weights for a test; not the official weights"
CLASSES = ("blue", "green", "red")
TRAINED = ("lora", "eva:1", "eva")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of one colour each, with noise: 18 to train, 9 to validate, 15 to test."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, number in (("train", 6), ("val", 3), ("test", 5)):
        for channel, name in enumerate(CLASSES):
            for i in range(number):
                pixels = noise.integers(0, 160, (32, 32, 3), dtype=np.uint8)
                pixels[:, :, 2 - channel] += 60
                path = folder / "colours" / part / name / f"{part}{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def content(root: Path) -> dict[str, Any]:
    return {
        "root": str(root), "task": "colours", "image_size": 32, "epochs": 3, "evaluated": [1], "seeds": 2, "rank": 2,
        "batch_size": 6, "equal_rates": [1e-4], "equal_methods": ["lora", "eva:1"], "equal_epochs": 1,
        "gradient_steps": 4, "learning_rates": {"lora": 1e-2, "eva:1": 1e-2, "eva": 1e-2},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the comparison has run once, as the demo's first part; `looks.json` has what was there when."""
    out = tmp_path_factory.mktemp("demo")
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    looks = []

    def noted(path: Path, title: str, sections: Any) -> None:
        looks.append(len(list(out.rglob("metrics.json"))))
        page_written(path, title, sections)

    page_written = page.write_page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dinov2_small, "find_weights", lambda **_: FoundWeights("test_vit", "none", False, ORIGIN))
        patch.setattr(page, "write_page", noted)
        assert demo.main(["--parts=vision", "--workers=0", f"--vision-config={config}", f"--out={out}"]) == 0
    (out / "looks.json").write_text(json.dumps(looks))
    return out


def _results(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "vision" / "results.json").read_text(encoding="utf-8"))
    return found


def _one_run(root: Path, **more: Any) -> OneRun:
    settings = {"root": str(root), "task": "colours", "model": "test_vit", "weights": "none", "image_size": 32}
    return OneRun(**{**settings, "method": "lora", "evaluated": (3,), "epochs": 3, "batch_size": 6, "rank": 2, **more})


@pytest.mark.parametrize(("evaluated", "early"), [((1, 3), 1), ((1, 2, 5), 2), ((1, 4), 1), ((5,), 5)])
def test_an_early_epoch_is_before_the_last(evaluated: tuple[int, ...], early: int) -> None:
    class Compared(Photographs):
        def __init__(self) -> None:
            self.evaluated = evaluated

    assert Compared().early_epoch == early


def test_every_method_runs_on_every_seed_at_both_rates(finished: Path) -> None:
    runs = sorted((r["method"], r["lr"], r["seed"], tuple(r["epochs"])) for r in _results(finished))
    tuned = [(method, 1e-2, seed, (1, 3)) for method in TRAINED for seed in (0, 1)]
    early = [(method, 1e-4, seed, (1,)) for method in TRAINED[:2] for seed in (0, 1)]
    assert runs == sorted([("linear", 0.0, 0, (3,)), *tuned, *early])
    budget = {r["method"]: sum(r["eva"]["ranks"].values()) for r in _results(finished) if r.get("eva")}
    assert budget["eva"] == budget["eva:1"]
    steps = {len(r["epochs"]): [row["step"] for row in r["gradients"]] for r in _results(finished) if r["lr"]}
    assert steps == {1: [1, 2, 3], 2: [1, 2, 3, 4]}  # three batches per epoch
    assert all(r["gradients"][0]["a"] == 0 < r["gradients"][0]["b"] for r in _results(finished) if r["lr"])


def test_frozen_features_are_those_of_timm_read_by_scikit_learn(finished: Path, root: Path) -> None:
    (linear,) = (r for r in _results(finished) if r["method"] == "linear")
    run = _one_run(root, method="linear")
    model: Any = photographs_run.classifier(run, 3).model
    parts = {}
    for split, evaluation in (("train", None), ("val", "val200"), ("test", "test")):
        data = open_task(root, "colours", "train800", evaluation=evaluation or "test")
        part = data.train if evaluation is None else data.evaluation
        pixels = np.stack([np.asarray(Image.open(part.folder / path)) for path in part.paths]) / 255
        normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x = torch.from_numpy(normal.transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            features = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        parts[split] = (features.numpy(), np.array(part.labels))
    scaler = StandardScaler().fit(parts["train"][0])
    scaled = {name: (scaler.transform(x), y) for name, (x, y) in parts.items()}
    fits = [LogisticRegression(C=10.0**power, max_iter=2000).fit(*scaled["train"]) for power in range(-5, 3)]
    best = min(fits, key=lambda fit: log_loss(scaled["val"][1], fit.predict_proba(scaled["val"][0])))
    assert linear["penalty"] == pytest.approx(best.C)
    assert linear["predicted"] == best.predict(scaled["test"][0]).tolist()
    assert linear["accuracy"] == [pytest.approx(best.score(*scaled["test"]))]
    assert linear["loss"] == [
        pytest.approx(log_loss(scaled["test"][1], best.predict_proba(scaled["test"][0])), rel=1e-3)
    ]


def test_an_early_look_is_the_beginning_of_the_run_to_the_end(root: Path, tmp_path: Path) -> None:
    whole, early = (
        photographs_run.finetune(run, RunFolder(tmp_path, run))
        for run in (_one_run(root, lr=1e-2, evaluated=(1, 3)), _one_run(root, lr=1e-2, evaluated=(1,), stop_after=1))
    )
    assert whole["epochs"] == [1, 3]
    assert early["epochs"] == [1]
    assert early["loss"] == whole["loss"][:1]
    assert len(whole["predicted"]) == 15


def test_the_page_shows_every_number_and_says_which_weights_these_are(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert text.count(ORIGIN) >= 4  # the lead, the facts, and below each table
    for method in TRAINED:
        losses = [r["loss"][-1] for r in _results(finished) if (r["method"], r["lr"]) == (method, 1e-2)]
        assert f"{np.mean(losses):.3f} ± " in text
    assert "At the same learning rate, 0.0001, the first 1 of 3 epochs" in text
    assert "Yang and Newsam" in text
    shown = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', text)
    files = {path.read_bytes() for path in finished.parent.rglob("colours/test/*/*.png")}
    assert 0 < len(shown) <= 12
    assert {base64.b64decode(each) for each in shown} <= files or not files
    assert not re.search(r'alt=""', text)


def test_the_first_picture_comes_with_the_first_complete_set_of_methods(finished: Path) -> None:
    first, last = json.loads((finished / "looks.json").read_text())
    total = len(_results(finished))
    assert last == total == 11
    # frozen features and three methods; in one process cell by cell, so that nothing of another seed is before
    assert first == 4


def test_samples_are_chosen_by_their_rule(root: Path) -> None:
    data = open_task(root, "colours", "train800", evaluation="test")
    truth = list(data.evaluation.labels)
    before = [(label + 1) % 3 if place < 8 else label for place, label in enumerate(truth)]
    after = [label if place < 7 else (label + 1) % 3 if place in (7, 9) else label for place, label in enumerate(truth)]
    found = samples(data, before, after, ("frozen", "tuned"))
    assert "Of 15 test images 7 were wrong before and are right after, 1 the other way round" in found.sentence
    assert len(found.figures) == 12
    names = CLASSES
    first = found.figures[0]
    assert first.caption == f"{names[truth[0]]}\n✗ before: {names[before[0]]}\n✓ after: {names[truth[0]]}"
    assert f"Photograph of {names[truth[0]]}" in first.alt


def test_what_changes_a_run_changes_its_identity(root: Path) -> None:
    run = _one_run(root, weights_digest="a", images="b", code="c")
    others = [replace(run, **{name: "x"}) for name in ("weights_digest", "images", "code", "method", "task")]
    others += [replace(run, stop_after=1), replace(run, seed=1), replace(run, image_size=48)]
    assert len({RunFolder("", each).id for each in (run, *others)}) == 9
    assert RunFolder("", replace(run, weights="elsewhere", root="elsewhere")).id == RunFolder("", run).id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("linear", "eva")}, "methods must have lora"),
        ({"methods": ("lora", "evil")}, "unknown method 'evil'"),
        ({"equal_methods": ("pissa",)}, "equal_methods must be among the methods that train adapters, got pissa"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
    ],
    ids=["no-lora", "unknown", "not-compared", "no-epochs"],
)
def test_settings_that_compare_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**changes)


def test_a_rate_that_is_tuned_and_equal_is_run_once(content: dict[str, Any]) -> None:
    changes = {"evaluated": (1,), "equal_rates": (1e-2, 1e-3), "equal_methods": None}
    comparison = Photographs(Settings(**{**content, **changes, "model": "test_vit", "weights": "none"}))
    jobs = [job for cell in comparison.cells() if cell.given for job in cell.final(cell.given)]
    assert len({job.id for job in jobs}) == len(jobs) == 1 + 2 * 3 + 2 * 3


@pytest.mark.parametrize("name", ["demo.yaml"])
def test_committed_learning_rates_are_the_best_of_their_grid_on_seeds_of_their_own(name: str) -> None:
    settings = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    tuning = settings["tuning"]
    assert not set(tuning["seeds"]) & set(range(settings["seeds"]))
    assert tuning["split"] == "val200"
    trained = [method for method in settings["methods"] if method != "linear"]
    assert sorted(settings["learning_rates"]) == sorted(trained)
    for method, lr in settings["learning_rates"].items():
        rows = [row for row in tuning["scores"] if row["method"] == method]
        assert lr == min(rows, key=lambda row: (row["loss"], -row["accuracy"]))["lr"]


# Where no weights can be had.


def _started(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> list[str]:
    """Names of the comparisons that the demo starts."""
    names = []

    def run(comparison: runner.Comparison) -> Any:
        names.append(comparison.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_comparison", run)
    assert demo.main(words) == 130
    return names


def test_digits_take_the_place_of_photographs_that_have_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(**_: Any) -> FoundWeights:
        raise UnreachableError("no weights can be had: neither the hub nor the package index answers")

    monkeypatch.setattr(dinov2_small, "find_weights", unreachable)
    assert _started(monkeypatch, ["--parts=vision", f"--out={tmp_path}"]) == ["digits"]
    said = capsys.readouterr().out
    assert said.count("neither the hub nor the package index answers") == 1
    assert "Handwritten digits, which need no weights, take their place." in said
    # learning rates of photographs are not chosen on digits
    assert demo.main(["--parts=vision", "--tune", f"--out={tmp_path}"]) == 2


@pytest.mark.slow
def test_without_a_network_the_demo_runs_on_digits(tmp_path: Path) -> None:
    rates = tmp_path / "digits.yaml"
    rates.write_text(yaml.safe_dump({"learning_rates": dict.fromkeys(digits.METHODS, 5e-3)}))
    nowhere = "http://127.0.0.1:9"
    environment = {
        **os.environ, "HF_ENDPOINT": nowhere, "HF_HUB_CACHE": str(tmp_path / "hub"), "PIP_INDEX_URL": nowhere,
        "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "", "EVA_LIGHTNING_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    tiny = ["--seeds=1", "--epochs=1", "--labels=40", "--pretrain-epochs=1", "--workers=0", f"--digits-config={rates}"]
    command = [sys.executable, "-m", "experiments.demo", "--parts=vision", *tiny, f"--out={tmp_path / 'out'}"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "No photographs: " in ended.stdout
    assert "EVA on handwritten digits" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


# The page in a browser.


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [1366, 360])
def test_the_page_fits_the_window(finished: Path, tmp_path: Path, width: int) -> None:
    inside = (finished / "report.html").resolve().as_uri()
    measure = (
        "const d = f.contentDocument, e = d.documentElement;"
        "const images = [...d.images].filter(i => !i.complete || !i.naturalWidth).length;"
        "document.title = [e.scrollWidth, e.clientWidth, images, d.images.length].join(' ');"
    )
    frame = f'<iframe id="f" src="{inside}" style="width:{width}px;height:900px;border:0" onload="{measure}"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><title>none</title>{frame}", encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout
    scrolled, visible, broken, number = map(int, re.search(r"<title>([\d ]+)</title>", dom)[1].split())  # type: ignore[index]
    assert scrolled <= visible <= width
    assert broken == 0
    assert number > 8
