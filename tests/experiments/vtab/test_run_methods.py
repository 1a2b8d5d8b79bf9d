"""The methods through ``python -m experiments.vtab run``: what the command records of each, and its bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eva_lightning import EVAInitCallback, EVAState
from eva_lightning.methods import method_names
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.data.datamodule import VTAB1K
from experiments.vtab.settings import command_line, main, parse
from tests.eva_lightning.methods.image_fits import fit, plain
from tests.eva_lightning.vision.fakes import make_task


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    make_task(tmp_path / "data")
    text = (
        f"--root {tmp_path / 'data'} --task kitti --model test_vit --weights none --image-size 32 --batch-size 8 "
        f"--rank 2 --epochs 2 --accelerator cpu --output {tmp_path / 'runs'}"
    )
    return text.split()


def test_every_method_can_be_asked_for() -> None:
    methods = method_names("vision")
    names = {parse(["--root", "x", "--task", "kitti", "--method", method]).run_name for method in methods}
    assert len(names) == len(methods)
    assert "kitti-dinov2_g14-lora-redistribute-r16-rho2-lr0.001-seed0" in names
    assert "kitti-dinov2_g14-eva-minor-r16-lr0.001-seed0" in names


@pytest.mark.parametrize(
    ("method", "trained_ranks"),
    [
        ("lora+", {2}), ("lora-ga", {4}), ("corda", {4}), ("lora-da", {2}), ("lora-one --keep-function", {4}),
        ("eva-minor", {2}),
    ],
)  # fmt: skip
def test_records_and_exports(method: str, trained_ranks: set[int], arguments: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    chosen = ["--method", *method.split(), "--name", "run", "--lora-plus-ratio=4", "--max-batches=1"]
    metrics = main([*arguments, *chosen])
    assert metrics["method"] == method.split()[0]
    assert metrics["rank"] == 2
    assert "rho" not in metrics
    tensors = load_file(tmp_path / "runs/run/adapter/adapter_model.safetensors")
    # what left the base weight comes off again in a plain LoRA of twice the rank
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == trained_ranks


@pytest.mark.filterwarnings("ignore:training has diverged")
def test_a_run_that_diverges_says_so_ends_with_3_and_exports_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--method=lora", "--lr=1e30", "--name=run", "--warmup-epochs=0"]
    assert command_line(command) == 3
    text = (tmp_path / "runs/run/metrics.json").read_text(encoding="utf-8")
    metrics = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert "the loss is nan at step" in metrics["diverged"]
    assert not (tmp_path / "runs/run/adapter").exists()
    capsys.readouterr()
    # a finished run is reported with its status
    assert command_line(command) == 3
    assert "Lower the learning rate" in capsys.readouterr().out


def test_settings_that_the_optimizer_cannot_compute_with_are_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line([*arguments, "--method=lora", "--lr=1e39", "--warmup-epochs=0"]) == 2
    assert "lower --lr or --weight-decay" in capsys.readouterr().err


def test_a_state_serves_another_rank_and_method(arguments: list[str], tmp_path: Path) -> None:
    module = plain()
    (callback,) = apply_method("eva", module, AdapterOptions(rank=4, rho=1.0))
    fit(module, [callback], VTAB1K(tmp_path / "data", "kitti", image_size=32, progress=False), max_steps=1)
    assert isinstance(callback, EVAInitCallback)
    assert callback.state is not None
    path = callback.state.save(tmp_path / "state")
    metrics = main([*arguments, "--method=lora-redistribute", "--name=run", f"--eva-state={path}"])
    assert metrics["ranks"] == EVAState.load(path).redistribute(2, 2.0)
    assert metrics["rho"] == 2.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--method=lora_ga", "unknown method 'lora_ga': did you mean lora-ga"),
        ("--method=eva:1", "unknown method 'eva:1': did you mean eva"),
        ("--method=lora --eva-state=x", "lora starts from no EVA state, but one is given: x"),
        ("--method=eva --eva-state=x", "An EVA state is two files, x.safetensors and x.json: x.safetensors is missing"),
        ("--method=eva-whiten --init=rotate", "eva-whiten has an initialisation of its own"),
        ("--method=lora+ --lora-plus-ratio=0", "--lora-plus-ratio must be a number above 0, got 0.0"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, sentence: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line([*arguments, *change.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
