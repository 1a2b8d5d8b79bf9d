from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.vtab import command_line, gpu, main, train
from benchmarks.vtab import data as data_part
from benchmarks.vtab.images import TaskImages
from eva_lightning.methods.apply import AdapterOptions, apply_method
from eva_lightning.vision.data.datamodule import VTAB1K, EpochShuffle
from eva_lightning.vision.module import ImageClassifier
from tests.eva_lightning.vision.fakes import make_task

MODEL = "test_vit"  # timm's own for tests: 160 pixels and up, three small blocks


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few small images."""
    monkeypatch.setattr(train.measure, "__defaults__", (MODEL, 2, 12, 32, 4, 2))
    monkeypatch.setattr(data_part.measure, "__defaults__", (40, 32, 1))


def test_one_table_and_a_file(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "speed.json"
    results = main(["--model=test_vit", "--repeats=2", f"--json={file}"])
    assert {"linear_epoch_ratio", "lora_epoch_ratio"} < set(results["train"])
    assert all(figure.median > 0 for figures in results.values() for figure in figures.values())
    printed = capsys.readouterr().out
    assert "<= 1.05" in printed
    assert "<= 0.1" in printed
    written = json.loads(file.read_text())
    assert set(written["figures"]) == set(results)
    assert written["settings"]["root"] is None
    if not torch.cuda.is_available():
        assert "gpu" not in results
        assert "gpu: not run, it needs a CUDA GPU" in printed
        assert "it needs a CUDA GPU" in written["not_run"]["gpu"]


@pytest.mark.parametrize("method", train.METHODS)
def test_the_bare_loop_does_the_work_of_the_trainer(method: str, tmp_path: Path) -> None:
    make_task(tmp_path, "kitti", counts={"train800": 8, "val200": 2, "test": 2})
    data = VTAB1K(tmp_path, "kitti", image_size=32, batch_size=4, cache_dir=tmp_path / "cache", progress=False)
    torch.manual_seed(0)
    module = ImageClassifier(MODEL, 4, 32)
    apply_method(method, module, AdapterOptions(rank=2))
    data.setup("fit")
    bare = train.BareLoop(module, data, epochs=4)
    shuffle = EpochShuffle(10, data.seed)

    def order() -> torch.Tensor:
        found = torch.tensor(list(shuffle))
        shuffle.set_epoch(shuffle.epoch + 1)
        return found

    bare.order = order
    interleaved = train.EpochsInTurn(bare)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=4, limit_val_batches=0, callbacks=[interleaved], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    trainer.fit(module, datamodule=data)
    assert len(interleaved.ours) == len(interleaved.bare) == 4
    ours = module.model.state_dict()
    moved = [name for name, value in ours.items() if not torch.equal(value, before[name])]
    assert "head.weight" in moved
    assert any("lora_B" in name for name in moved) == (method == "lora")
    for name, value in bare.model.state_dict().items():
        torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-6)


def test_bare_epochs_are_not_timed_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("benchmarks.vtab.train.time.perf_counter", lambda: clock[0])
    interleaved = train.EpochsInTurn(lambda: wait(20.0))
    arguments: Any = (None, None)
    interleaved.on_train_start(*arguments)
    for seconds in (3.0, 4.0):
        wait(seconds)
        interleaved.on_train_epoch_end(*arguments)
    assert (interleaved.ours, interleaved.bare) == ([3.0, 4.0], [20.0, 20.0])


def test_data_of_a_users_folder(small: None, tmp_path: Path) -> None:
    make_task(tmp_path, "kitti", size=300)
    figures = data_part.measure(TaskImages(str(tmp_path), "kitti"))
    assert set(figures) == {"second_epoch_ratio", "next_run_ratio", "first_epoch_s", "second_epoch_s"}
    assert figures["second_epoch_ratio"].median < 1


def test_made_up_images_are_a_task() -> None:
    with TaskImages().folder(20) as (root, task):
        data = VTAB1K(root, task, image_size=32, progress=False)
        assert len(data.data.train) == 20
        assert set(data.data.train.labels) == set(range(10))
        with Image.open(root / task / "0003.jpg") as image:
            assert image.size == (320, 240)
            assert 20 < np.asarray(image).std() < 90
    assert not root.exists()


def test_the_part_for_gpus_runs_on_anything(tmp_path: Path) -> None:
    make_task(tmp_path, "kitti")
    trial = gpu.Trial(MODEL, image_size=32, batch_size=8, rank=2, steps=4, accelerator="cpu", precision="32-true")
    measured = gpu.measure(TaskImages(str(tmp_path), "kitti"), trial)
    figures = {name: figure.median for name, figure in measured.items()}
    assert figures["images_per_second"] > 0
    assert figures["eva_init_batches"] >= 1
    expected = 100 * figures["eva_init_s"] * figures["images_per_second"] / 30_000
    assert figures["eva_init_share_percent"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts=trian"], "unknown part 'trian': did you mean train?"),
        (["--repeats=0"], "--repeats must be a whole number of at least 1, got 0"),
        (["--root=nowhere"], "the VTAB-1K folder nowhere does not exist"),
        (["--model=vit_tinny"], "unknown model 'vit_tinny'"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
