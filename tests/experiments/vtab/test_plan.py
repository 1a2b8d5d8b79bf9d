from __future__ import annotations

import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from eva_lightning.methods import MethodKey
from eva_lightning.methods.apply import apply_method
from eva_lightning.vision.data.tasks import TASKS
from eva_lightning.vision.module import ImageClassifier
from experiments.runner.jobs import Job, Outcome
from experiments.runner.progress import span
from experiments.vtab import plan as planning
from experiments.vtab import timing
from experiments.vtab.settings import Settings
from experiments.vtab.sizes import ModelSize, cache_bytes, missing_cache_bytes
from experiments.vtab.states import SharedState
from experiments.vtab.sweep_settings import command_line, parse
from experiments.vtab.timing import Speed, cost_class, measure
from tests.experiments.runner.fake_pool import FakePool
from tests.experiments.vtab.sweep_fakes import make_tasks, pretend, sweep, words

SMALL = "--tasks kitti,dmlab --methods lora,linear,eva --lrs 1e-3,1e-2 --ranks 2,4 --tune-seeds 2 --final-seeds 3"


def tiny(**changes: object) -> Settings:
    settings = Settings(root="x", task="kitti", model="test_vit", weights="none", image_size=32, batch_size=8,
                            accelerator="cpu")  # fmt: skip
    return replace(settings, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["linear", "fft", "lora"])
@pytest.mark.parametrize("bias", ["all", "none"])
def test_sizes_are_those_of_the_model_as_built(method: str, bias: str) -> None:
    settings = tiny(method=method, rank=3, bias=bias)
    module = ImageClassifier("test_vit", 7, 32)
    size = ModelSize.of(settings)
    head = sum(p.numel() for p in module.get_submodule(module.head_name).parameters())
    assert size.parameters + head == sum(p.numel() for p in module.parameters())
    assert size.depth == len(module.model.blocks)  # type: ignore[arg-type]
    apply_method(method, module, settings.adapter_options())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert size.trained(MethodKey.parse(method), 3, 7, bias) == trained


def test_giant_is_counted_without_being_built() -> None:
    """1,134.8 M parameters at 224 pixels; qkv, proj and two SwiGLU layers in each of 40 blocks."""
    size = ModelSize.of(replace(tiny(), model="dinov2_g14", image_size=224))
    assert size.parameters / 1e6 == pytest.approx(1134.8, abs=0.5)
    assert (size.depth, len(size.widths)) == (40, 160)
    assert size.widths[:4] == ((1536, 4608), (1536, 1536), (1536, 8192), (4096, 1536))
    split = ModelSize.of(replace(tiny(), model="dinov2_g14", image_size=224, split_fused=True))
    assert len(split.widths) == 280  # as in the authors' code


def test_state_on_disk_is_as_large_as_said(tmp_path: Path) -> None:
    make_tasks(tmp_path / "data", ["kitti"])
    settings = parse(words(tmp_path / "data", tmp_path / "out", "--tasks kitti --methods eva --ranks 4"))
    shared = SharedState.of(settings.base, 8)
    assert shared is not None
    file = shared.obtain()
    said = ModelSize.of(settings.base).state_bytes(8)
    assert file.with_name(f"{file.name}.safetensors").stat().st_size == pytest.approx(said, rel=0.2)


def test_cache_by_official_sizes(tmp_path: Path) -> None:
    one = 3 * 224 * 224
    assert cache_bytes(TASKS["kitti"], 224) == (800 + 200 + 1000 + 711) * one
    assert missing_cache_bytes([TASKS["kitti"]], 224, None) == 0
    (tmp_path / "kitti-test-224px-0123.npy").touch()
    assert missing_cache_bytes([TASKS["kitti"], TASKS["dtd"]], 224, tmp_path) == (2000 + 2000 + 1880) * one


def test_methods_cost_what_their_kind_costs() -> None:
    kinds = {"eva": "lora", "pissa": "lora", "eva-dora": "dora", "dora": "dora", "fft": "fft", "adalora": "adalora"}
    assert {method: cost_class(method) for method in kinds} == kinds


def test_extrapolation_from_two_blocks_agrees_with_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In order of magnitude: the machine has other things to do."""
    settings = tiny(model="vit_tiny_patch16_224", image_size=64, batch_size=16)
    size = ModelSize.of(settings)
    whole = measure(settings, ["lora"], size, 4)
    assert whole.how == "whole steps of batch 16 by lora"
    monkeypatch.setattr(timing._Bench, "fits", lambda *args: False)
    parts = measure(settings, ["lora"], size, 4)
    assert re.match(r"extrapolated from 1 and 2 of 12 blocks and \d+ of 16 images, by lora", parts.how)
    assert 0.1 < parts.step["lora"] / whole.step["lora"] < 10
    assert 0.1 < parts.image / whole.image < 10


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = Speed({"lora": 0.5, "linear": 0.25, "eva": 0.5}, 0.01, None, "a device", "made up")
    monkeypatch.setattr(planning, "measure", lambda *args: speed)
    monkeypatch.setattr(planning, "_PER_RUN", 0.0)
    monkeypatch.setattr(planning, "_PER_BYTE", 0.0)


@pytest.mark.usefixtures("fixed_speed")
def test_plan_counts_runs_and_time_and_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tasks(tmp_path / "data")
    line = words(tmp_path / "data", tmp_path / "out", f"{SMALL} --epochs 2 --workers 2 --plan")
    sweep(line)
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    rows = {m[0]: m[1:] for m in re.findall(r"^  (\S+) +(\S.*?) tuning \+ +(\S.*?) final", text, re.MULTILINE)}
    assert rows == {"lora": ("16", "6"), "linear": ("8", "6"), "eva": ("32", "6"), "together": ("56", "18")}
    assert "linear" in next(row for row in text.splitlines() if "no rank: that axis collapses" in row)
    assert "ρ searched over 1 and 2" in next(row for row in text.splitlines() if row.startswith("  eva "))
    assert "EVA states: two per task (train800, all 1,000), of 8 components per layer" in text
    assert "data: all 2 tasks are in" in text
    # by hand: 2 epochs of 800/8 steps and 200 images; 2 epochs of 1000/8 steps, and 711 or 22,735 images
    tune, test = 200 * 0.01, (711 + 22735) * 0.01
    lora = 16 * (200 * 0.5 + tune) + 3 * (2 * 250 * 0.5 + test)
    eva = lora + 16 * (200 * 0.5 + tune)  # two ρ
    linear = 8 * (200 * 0.25 + tune) + 3 * (2 * 250 * 0.25 + test)
    assert f"  {'lora':<18} {lora / 3600:,.1f} CPU-hours" in text
    assert f"  {'linear':<18} {linear / 3600:,.1f} CPU-hours" in text
    states = 2 * 2 * 16 * 8 * 0.01
    assert f"work: {(lora + eva + linear + states) / 3600:,.1f} CPU-hours" in text
    assert f"estimate: {span((lora + eva + linear + states) / 2)} with 2 runs at a time" in text


@pytest.mark.usefixtures("fixed_speed")
def test_plan_says_what_is_done_and_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tasks(tmp_path / "data")
    done = pretend()

    def work(job: Job) -> Outcome:
        if not job.tags["method"].startswith("eva") or job.phase == "final":
            return done(job)
        job.folder.fail("no")
        return Outcome(job.id, "failed", error="no")

    line = words(tmp_path / "data", tmp_path / "out", SMALL)
    sweep(line, FakePool(work))
    capsys.readouterr()
    sweep([*line, "--plan"])
    text = capsys.readouterr().out
    rows = {m[0]: m[1:] for m in re.findall(r"^  (\S+) +(\S.*?) tuning \+ +(\S.*?) final", text, re.MULTILINE)}
    assert rows == {
        "lora": ("16 (16 done)", "6 (6 done)"), "linear": ("8 (8 done)", "6 (6 done)"), "eva": ("32 (32 failed)", "6"),
        "together": ("56 (24 done, 32 failed)", "18 (12 done)"),
    }  # fmt: skip
    assert f"  {'lora':<18} 0.0 CPU-hours" in text


@pytest.mark.usefixtures("fixed_speed")
def test_plan_without_data_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{socket.gethostname()}:9")
    sweep(words(tmp_path / "none", tmp_path / "out", f"{SMALL} --weights nowhere.pth --plan"))
    text = capsys.readouterr().out
    assert f"data: MISSING for 2 of 2 tasks (there is no folder {tmp_path / 'none'})" in text
    assert f"python -m experiments.vtab prepare --root {tmp_path / 'none'}" in text
    assert "weights: MISSING: weight file nowhere.pth does not exist" in text


def test_wrong_names_are_wrong_in_a_plan_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(words(tmp_path, tmp_path / "out", f"{SMALL} --model test_vitt --plan")) == 2
    assert "unknown model 'test_vitt': did you mean test_vit" in capsys.readouterr().err
