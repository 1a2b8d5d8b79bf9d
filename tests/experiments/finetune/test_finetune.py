"""``eva-lightning finetune`` from a folder of images to a page, an adapter and a merged model, on a tiny network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import Tensor

from eva_lightning.sealed import read_sealed_json
from eva_lightning.vision import ImageFolderDataModule
from eva_lightning.vision.data.splits import open_folder
from experiments.finetune import command_line, main, page, parse, run
from experiments.finetune.page import confusion
from experiments.runner.run_folder import RunFolder
from tests.experiments.finetune.fakes import CLASSES, photographs, weights
from tests.paths import ROOT


def words(folder: Path, *more: str) -> list[str]:
    text = (
        f"--data {folder / 'trees'} --model test_vit --weights {folder / 'weights.safetensors'} --image-size 32 "
        f"--batch-size 8 --rank 4 --epochs 2 --lr 1e-2 --accelerator cpu --output {folder / 'runs'} --name run"
    )
    return [*text.split(), *more]


@dataclass
class Finished:
    """A run that was interrupted once, when it was about to write its page."""

    folder: Path
    statuses: tuple[int, int]
    printed: str
    metrics: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finetune")
    photographs(folder / "trees")
    weights(folder / "weights.safetensors")
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        with patch.context() as inner:

            def interrupted(*args: object) -> None:
                raise KeyboardInterrupt

            inner.setattr(run, "write_report", interrupted)
            first = command_line(words(folder))
        assert not (folder / "runs/run/metrics.json").exists()
        printed.clear()
        second = command_line(words(folder))
    metrics = read_sealed_json(folder / "runs/run/metrics.json")
    return Finished(folder, (first, second), "\n".join(printed), metrics)


@pytest.fixture(scope="module")
def images(finished: Finished) -> tuple[list[Path], Tensor, list[int]]:
    """Files, pixels as they were tested, and labels of the test images."""
    data = ImageFolderDataModule(finished.folder / "trees", image_size=32, batch_size=64, progress=False)
    data.setup("test")
    pixels, labels = next(iter(data.test_dataloader()))
    split = data.data.evaluation
    return [split.folder / path for path in split.paths], pixels, labels.tolist()


def code(printed: str) -> list[str]:
    return [line.strip() for line in printed.splitlines() if line.startswith("    ")]


def predicted(model: Any, pixels: Tensor) -> list[int]:
    with torch.no_grad():
        found: list[int] = model.eval()(pixels).argmax(dim=1).tolist()
        return found


def test_an_interrupted_run_resumes_and_trains_nothing_twice(finished: Finished) -> None:
    assert finished.statuses == (130, 0)
    log = (finished.run / "log.txt").read_text()
    assert log.count("epoch 2/2") == 1
    assert "resuming from" in log


def test_the_printed_lines_load_the_adapter_by_peft_and_the_merged_model_by_timm(
    finished: Finished, images: tuple[list[Path], Tensor, list[int]]
) -> None:
    files, pixels, _ = images
    names: dict[str, Any] = {"timm": timm, "peft": peft}
    lines = code(finished.printed)
    assert [line.split(" = ")[0] for line in lines] == ["base", "model", "model", "transform"]
    exec("\n".join(lines[:2]), names)
    adapted = names["model"]
    assert isinstance(adapted, peft.PeftModel)
    exec("\n".join(lines[2:]), names)
    merged = names["model"]
    assert predicted(adapted, pixels) == predicted(merged, pixels) == finished.metrics["predicted"]
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(pixels), merged.eval()(pixels), rtol=1e-4, atol=1e-4)
    # as somebody who has only timm and the files
    own = torch.stack([names["transform"](Image.open(file).convert("RGB")) for file in files])
    torch.testing.assert_close(own, pixels)
    assert merged.pretrained_cfg["label_names"] == list(CLASSES)
    file = str(finished.run / "merged/model.safetensors")
    assert (
        predicted(timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path=file), pixels)
        == (finished.metrics["predicted"])
    )


def test_the_accuracy_of_the_page_is_scikit_learns(
    finished: Finished, images: tuple[list[Path], Tensor, list[int]]
) -> None:
    _, pixels, labels = images
    merged = timm.create_model(f"local-dir:{finished.run / 'merged'}", pretrained=True)
    accuracy = accuracy_score(labels, predicted(merged, pixels))
    page = (finished.run / "report.html").read_text(encoding="utf-8")
    assert f"{accuracy:.1%} of {len(labels)} test images are recognised" in page
    assert finished.metrics["accuracy"] == pytest.approx(accuracy)
    wrong = sum(a != b for a, b in zip(labels, finished.metrics["predicted"], strict=True))
    thumbnails = len(re.findall(r'<img alt="Test image of', page))
    assert thumbnails == min(6, wrong) + min(6, len(labels) - wrong)
    for heading in ("By epoch", "Classes", "Ranks", "Use it", "Repeat it"):
        assert f"{heading}</h3>" in page
    assert "Loss by epoch; after the last: training" in page
    assert "validation" in page
    for line in code(finished.printed):
        assert line.replace('"', "&#34;").replace("'", "&#39;") in page


def test_the_card_says_what_was_done(finished: Finished) -> None:
    card = (finished.run / "adapter/README.md").read_text(encoding="utf-8")
    accuracy = finished.metrics["accuracy"]
    for row in (
        "| method | EVA (LoRA) |", "| ρ | 2 |", "| r | 4 |", "| weights | weights of the file weights.safetensors |",
        "| classes | ash, birch, oak |", f"| accuracy | {accuracy:.1%} of 9 test images",
    ):  # fmt: skip
        assert row in card, row


def test_a_finished_run_is_reported_and_changed_images_are_another_run(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished.run / "merged/model.safetensors").stat().st_mtime_ns
    assert main(words(finished.folder)) == finished.metrics
    out = capsys.readouterr().out
    assert "is finished already" in out
    assert code(out) == code(finished.printed)
    assert (finished.run / "merged/model.safetensors").stat().st_mtime_ns == before
    added = finished.folder / "trees/oak/99.jpg"
    added.write_bytes((finished.folder / "trees/oak/00.jpg").read_bytes())
    try:
        assert command_line(words(finished.folder)) == 2
    finally:
        added.unlink()
    assert "holds another run, with images=" in capsys.readouterr().err
    assert command_line(words(finished.folder, "--lr", "0.5")) == 2
    assert "holds another run, with lr=0.01 (now 0.5)" in capsys.readouterr().err


def test_the_rate_of_the_lowest_validation_loss_is_chosen_without_test_images(
    finished: Finished, tmp_path: Path
) -> None:
    metrics = main(words(finished.folder, "--tune", "--lrs", "3e-3,1e-2", "--epochs", "1", "--output", str(tmp_path)))
    tried = {row["lr"]: row["loss"] for row in metrics["tuning"]}
    assert {3e-3, 1e-2} <= set(tried)
    assert metrics["lr"] == min(tried, key=lambda lr: tried[lr])
    runs = [read_sealed_json(file) for file in (tmp_path / "run/tuning").rglob("metrics.json")]
    assert {each["evaluation_split"] for each in runs} == {"val"}
    assert sorted(tried.values()) == sorted(each["loss"] for each in runs)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert f"{tried[metrics['lr']]:.4g} *" in page


def test_the_command_of_the_page_repeats_the_run() -> None:
    words = "--data a/birds --lr 0.00123456789 --hold-out false --split-seed 3 --split-file 'my table.csv'"
    words += " --target-modules conv1,conv2"
    run = parse(shlex.split(words)).one_run(0.00123456789, "digest")
    command = shlex.split(page._command(run))
    assert command[:2] == ["eva-lightning", "finetune"]
    assert parse(command[2:]).one_run(parse(command[2:]).lr, "digest") == run
    assert run.as_vtab("birds").target_modules == ("conv1", "conv2")


def test_a_damaged_validation_image_is_said_before_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = open_folder(photographs(tmp_path / "trees")).validation
    assert validation is not None
    (tmp_path / "trees" / validation.paths[-1]).write_bytes(b"\xff\xd8 no image")
    weights(tmp_path / "weights.safetensors")
    assert command_line(words(tmp_path, "--cache", "none")) == 2
    assert f"{validation.paths[-1]} cannot be decoded" in capsys.readouterr().err
    assert not (tmp_path / "runs/run/metrics.csv").exists()


def test_confusions_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (60,), generator=generator).tolist()
    found = torch.randint(4, (60,), generator=generator).tolist()
    names, matrix = ["a", "b", "c", "d"], confusion_matrix(labels, found)
    cells = confusion(labels, found, names).cells
    recall = matrix.diagonal() / matrix.sum(axis=1)
    assert list(cells.index) == [names[label] for label in recall.argsort(kind="stable")]
    for label, name in enumerate(names):
        assert cells.loc[name, "Recognised"] == f"{recall[label]:.0%}"
        counts = {other: int(count) for other, count in re.findall(r"(\w) \((\d+)\)", cells.loc[name, "Taken for"])}
        assert counts == {names[j]: matrix[label, j] for j in range(4) if j != label and matrix[label, j]}


def _no_folder(folder: Path) -> None:
    (folder / "trees").rename(folder / "elsewhere")


def _broken(folder: Path) -> None:
    (folder / "trees/oak/03.jpg").write_text("no image")


WRONG: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no folder": (_no_folder, [], "there is no folder of images"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), [], "weight file .* does not exist"),
    "a damaged image": (_broken, [], r"image .*oak/03\.jpg cannot be decoded"),
    "no model": (lambda f: None, ["--model", "dinov2_b15"], "unknown model 'dinov2_b15': did you mean dinov2_"),
    "no method": (lambda f: None, ["--method", "evo"], "--method.*did you mean|unknown method 'evo': did you mean eva"),
    "no such accelerator": (lambda f: None, ["--accelerator", "gpuu"], "unknown accelerator 'gpuu': did you mean gpu"),
    "no such device": (
        lambda f: None,
        ["--accelerator", "tpu"],
        "--accelerator tpu is not on this machine",
    ),
    "a share of 1": (lambda f: None, ["--test-share", "1"], "--test-share must be a number above 0 and below 1"),
    "a wrong size": (lambda f: None, ["--image-size", "33"], "must be a multiple of test_vit's patch size 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_one_sentence(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photographs(tmp_path / "trees")
    weights(tmp_path / "weights.safetensors")
    spoil, more, sentence = WRONG[case]
    spoil(tmp_path)
    assert command_line(words(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("runs/run/adapter")) + list(tmp_path.glob("runs/run/report.html"))


def test_a_mistyped_folder_is_answered_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from experiments.finetune import command_line; "
        "sys.exit(command_line(['--data', 'nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "there is no folder of images nowhere" in done.stderr


def test_defaults_are_those_of_the_document(tmp_path: Path) -> None:
    settings = parse(["--data", "birds"])
    assert (settings.method, settings.rho, settings.rank, settings.lr) == ("eva", 2.0, 8, 1e-3)
    assert settings.run_name == "birds-dinov2_s14-eva-r8-rho2-lr0.001-seed0"
    assert parse(["--data", "birds#1?"]).run_name.startswith("birds_1_-"), "timm's local-dir: ends at # and ?"
    one = settings.one_run(1e-3, "digest")
    assert one.as_vtab("birds").pos_embed == "timm", "timm's own model must fit the adapter"
    moved = parse(["--data", "elsewhere/birds", "--workers", "3"]).one_run(1e-3, "digest")
    assert RunFolder("x", moved).id == RunFolder("x", one).id
