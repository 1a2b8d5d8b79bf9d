"""The benchmark measures what it says: references pinned to dense SVDs, PEFT left to itself, times of real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.initialisation import command_line, main, memory, peft_eva
from benchmarks.initialisation import runner as runner_module
from benchmarks.initialisation.runner import Runner
from benchmarks.initialisation.settings import SIZES, Settings
from benchmarks.initialisation.variance import Covariances, captured_variance
from benchmarks.models import build_classifier, randomise_realistically
from benchmarks.photographs import make_images
from experiments.runner.settings import parse_settings
from tests.paths import ROOT
from tests.svd_helpers import captured_variance as reference_captured
from tests.svd_helpers import decaying, reference

SMALL = "--models test_vit --image-size 32 --batch-size 4 --r 4"
TARGETS = [f"model.blocks.{i}.{kind}" for i in range(6) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def runner() -> Runner:
    images = make_images(None, 4, 4, 32, seed=0)
    return Runner(build_classifier("test_vit", 32, None, 0), images.batches, torch.device("cpu"), r=4)


def test_one_table_and_a_document(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "init.json"
    text = f"{SMALL} --batches 4 --heldout-batches 2 --repeats 2 --no-memory --profile --json {file}"
    document = main(text.split())
    assert "ours (default)" in capsys.readouterr().out
    printed = json.loads(file.read_text())
    assert printed == json.loads(json.dumps(document))
    assert {"processor", "threads", "load_average", "versions"} <= set(printed["machine"])
    result = printed["models"][0]
    assert result["layers"] == len(TARGETS)
    assert "1/f colour noise" in result["images"]
    assert 0 < result["variance_in_top_32"] <= 1
    assert len(result["forward"]["wall"]) == 3
    ours, peft = result["methods"]
    assert [ours["name"], peft["name"]] == ["ours (default)", "PEFT"]
    assert ours["n_batches"] <= 4
    assert (peft["n_batches"], peft["n_forwards"], peft["stopped_by_itself"]) == (4, 5, False)
    assert ours["bit_identical"] is True
    assert peft["bit_identical"] is None
    assert len(ours["seconds"]["values"]) == 2
    assert ours["peft_over_ours"] == pytest.approx(peft["seconds"]["median"] / ours["seconds"]["median"])
    for row in (ours, peft):
        assert set(row["captured_per_layer"]) == set(row["heldout_per_layer"]) == set(TARGETS)
        for key in ("captured", "heldout"):
            assert 0.3 < row[key]["min"] <= row[key]["median"] <= 1 + 1e-9
        assert row["over_forward"]["median"] > 0.5
    assert any(row["function"] == "on_fit_start" for row in result["profile"]["ours (default)"])


def test_all_tokens_through_the_exact_engine_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"{SMALL} --batches 3 --engine exact --tokens-per-sample all --peft-batches 0 --no-memory --repeats 1"
    rows = main(text.split())["models"][0]["methods"]
    assert [row["name"] for row in rows] == ["ours (exact)"]
    assert rows[0]["captured"]["min"] >= 0.9999
    out = capsys.readouterr().out
    assert "ours (exact)" in out
    assert "1/f colour noise" in out


def test_forward_is_timed_per_minibatch_and_leaves_the_classifier_alone(runner: Runner) -> None:
    before = {name: value.clone() for name, value in runner.classifier.state_dict().items()}
    timings = runner.forward(3)
    assert len(timings) == 3
    assert timings[0].wall < timings[1].wall < timings[2].wall
    runner.ours(max_batches=2)
    peft_eva.initialise(runner, 2, TARGETS)
    after = runner.classifier.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_peft_stops_by_itself_where_it_converges(runner: Runner) -> None:
    outcome = peft_eva.initialise(runner, 50, TARGETS, tau=0.01)
    assert outcome.stopped
    assert outcome.n_batches < 50
    capped = peft_eva.initialise(runner, 3, TARGETS, tau=0.999999)
    assert not capped.stopped
    assert capped.n_batches == 3
    assert set(capped.components) == set(TARGETS)
    assert all(v.shape[0] == 8 for v in capped.components.values())
    assert set(capped.ranks) == set(TARGETS)
    assert sum(capped.ranks.values()) == 4 * len(TARGETS)


def test_covariances_match_a_dense_svd() -> None:
    layer = nn.Linear(24, 3)
    model = nn.Sequential(layer)
    x = decaying(300, 24)
    for double_dim in (1, 64):
        covariances = Covariances({"0": layer}, double_dim)
        for part in x.split(50):
            covariances.add(lambda part=part: model(part))
        sigma, v = reference(x)
        spectrum = torch.linalg.eigvalsh(covariances.covariance("0")).flip(0)
        np.testing.assert_allclose(spectrum.sqrt(), sigma, rtol=1e-5)
        other = torch.linalg.qr(torch.randn(24, 5)).Q.T
        values, share = covariances.captured({"best": {"0": v[:5].float()}, "other": {"0": 3 * other}})
        assert values["best"]["0"] == pytest.approx(1, abs=1e-6)
        # of the rows' span: scaled rows capture no more
        assert values["other"]["0"] == pytest.approx(reference_captured(x, other), rel=1e-5)
        assert share == pytest.approx(1)
    assert not layer._forward_pre_hooks


def test_constant_inputs_are_captured() -> None:
    assert captured_variance(torch.zeros(4, 4), torch.zeros(4), torch.eye(4)[:2]) == 1


def test_random_weights_have_power_law_spectra() -> None:
    model = nn.Sequential(nn.Linear(48, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    randomise_realistically(model, seed=0, power=0.7)
    sigma = torch.linalg.svdvals(model[0].weight.detach())  # type: ignore[operator,union-attr]
    np.testing.assert_allclose(sigma / sigma[0], torch.arange(1, 33) ** -0.7, rtol=1e-4)
    assert float(model[0].weight.detach().square().sum()) == pytest.approx(32)  # type: ignore[operator,union-attr]
    assert all(float(module.bias.detach().abs().min()) > 0 for module in model)  # type: ignore[operator,union-attr]


def test_images_come_from_the_folder_and_are_normalised(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (40, 30), (i * 40, 128, 255)).save(tmp_path / f"{i}.png")
    images = make_images(tmp_path, 3, 2, 16, seed=1)
    assert images.source == f"6 images drawn from the 6 in folder {tmp_path.name}"
    blue = torch.cat([batch[0][:, 2] for batch in images.batches])
    np.testing.assert_allclose(blue, (1 - 0.406) / 0.225, rtol=1e-5)
    again = make_images(tmp_path, 3, 2, 16, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(images.batches, again.batches, strict=True))


def test_memory_is_the_difference_of_peaks(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Runner, "forward", lambda self, n: calls.append(f"forward {n}"))
    monkeypatch.setattr(Runner, "ours", lambda self, **arguments: calls.append(f"ours {arguments}"))
    peaks = iter([100, 500, 300, 375, 310, 330, 305, 395])  # the heap still grows in the first round

    def reset() -> None:
        calls.append("reset")

    value = memory.difference_of_peaks(runner, "ours", 2, {"max_batches": 2}, reset, lambda: next(peaks))
    assert value == 75
    assert calls == ["reset", "forward 2", "reset", "ours {'max_batches': 2}"] * 4


PEAKS = """
import torch
from benchmarks.initialisation import memory

for n in (200, 10):
    memory.reset_resident()
    before = memory.peak_resident()
    torch.ones(n * 2**18)
    print(memory.peak_resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_sees_torch_and_can_be_reset() -> None:
    # a process of its own: one that has freed much may give out what it still holds
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    large, small = map(int, done.stdout.split())
    assert 190 * 2**20 < large < 230 * 2**20
    assert small < 30 * 2**20


def settings_of(text: str) -> Settings:
    return parse_settings(Settings, "init", "", text.split())


def test_short_names_and_the_callbacks_defaults() -> None:
    settings = settings_of("--models tiny,test_vit")
    assert settings.model_names == [SIZES["tiny"], "test_vit"]
    # what is not given is left to the callback
    assert settings.callbacks() == {"default": {"tau": 0.99}}
    assert settings.most_peft_batches == settings.batches == 16
    settings = settings_of("--tokens-per-sample 32 --engine exact,sketch")
    exact = {"tau": 0.99, "tokens_per_sample": 32, "engine": "exact"}
    assert settings.callbacks() == {"exact": exact, "sketch": {**exact, "engine": "sketch"}}
    assert settings_of("--tokens-per-sample all").callbacks()["default"]["tokens_per_sample"] is None
    assert settings_of("--precision bf16").full_precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--batches 0", "--batches must be a whole number of at least 1, got 0"),
        ("--rho 0.5", "--rho must be a number of at least 1, got 0.5"),
        ("--tokens-per-sample few", "--tokens-per-sample must be a positive number or 'all', got 'few'"),
        ("--models test_vit --image-size 32 --images nowhere", "images: nowhere is not a folder"),
        ("--models test_vit --engine best --device cpu --image-size 32 --batches 1", "best"),
        ("--models vit_tinny", "vit_tinny"),
        ("--precision fp8", "unknown precision 'fp8'"),
        ("--model test_vit", "unknown option '--model': did you mean --models"),
    ],
)
def test_mistakes_are_one_sentence(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(text.split()) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert message in err[-1]


def test_interruption_is_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    # in the Trainer, which turns it into SystemExit
    monkeypatch.setattr(runner_module, "run_forward", interrupted)
    file = tmp_path / "x.json"
    arguments = ["--models", "test_vit", "--image-size", "32", "--batches", "1", "--batch-size", "1", "--json"]
    assert command_line([*arguments, str(file)]) == 130
    assert not file.exists()
