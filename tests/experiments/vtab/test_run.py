from __future__ import annotations

import csv
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image

from eva_lightning import EVAState
from eva_lightning.sealed import read_sealed_json
from eva_lightning.vision import module as vision_module
from eva_lightning.vision.data.datamodule import VTAB1K
from experiments.metaworld import finetune
from experiments.runner.run_folder import RunFolder
from experiments.vtab.settings import Settings, command_line, main, parse
from tests.eva_lightning.vision.fakes import make_task
from tests.paths import ROOT

SHARED = ROOT.parent / "shared" / "data" / "vtab-1k"


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    make_task(tmp_path / "data")
    text = (
        f"--root {tmp_path / 'data'} --task kitti --model test_vit --weights none --image-size 32 --batch-size 8 "
        f"--rank 4 --epochs 2 --accelerator cpu --output {tmp_path / 'runs'} --name run"
    )
    return text.split()


def no_model(*args: object, **kwargs: object) -> None:
    raise AssertionError("a model was built")


def test_defaults_are_the_papers() -> None:
    settings = parse(["--root", "x", "--task", "caltech101"])
    assert settings == Settings(root="x", task="caltech101")
    expected: dict[str, Any] = {
        "method": "eva", "model": "dinov2_g14", "rank": 16, "rho": 2.0, "alpha": 1.0, "bias": "all", "epochs": 30,
        "warmup_epochs": 3.0, "weight_decay": 0.05, "batch_size": 64, "image_size": 224, "normalization": "imagenet",
        "dropout": 0.0, "tau": 0.99, "split": "train800val200",
    }  # fmt: skip
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.run_name == "caltech101-dinov2_g14-eva-r16-rho2-lr0.001-seed0"


def test_eva_run_writes_its_folder(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = main(arguments)
    run = tmp_path / "runs/run"
    assert metrics == read_sealed_json(run / "metrics.json")
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["evaluation_images"] == 12
    assert not metrics["official_sizes"]
    assert not metrics["limited"]
    out = capsys.readouterr().out
    assert f"kitti test accuracy {metrics['accuracy']:.2%} (12 images)" in out
    assert "warning: kitti/test.txt lists 12 images where VTAB-1K has 711" in out
    assert "kitti test accuracy" in (run / "log.txt").read_text()
    with (run / "metrics.csv").open() as handle:
        assert [row["epoch"] for row in csv.DictReader(handle)] == ["1", "2"]
    for name in ("loss", "accuracy", "ranks", "spectra"):
        assert Image.open(run / f"plots/{name}.png").size[0] > 100
    state = EVAState.load(run / "eva_state")
    assert state.ranks == metrics["ranks"]
    assert sum(state.ranks.values()) == 4 * len(state.ranks)
    assert parse(["--config", str(run / "config.yaml")]) == parse(arguments)


def test_adapter_folder_loads_in_stock_peft_with_the_same_accuracy(arguments: list[str], tmp_path: Path) -> None:
    from peft import PeftModel

    metrics = main([*arguments, "--lr", "1e-2"])
    torch.manual_seed(0)
    # the base weights of the run: the seed is set, then the model is built
    import lightning as L

    L.seed_everything(0, verbose=False)
    base = vision_module.create_backbone("test_vit", 4, 32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "runs/run/adapter")).eval()
    data = VTAB1K(tmp_path / "data", "kitti", image_size=32, progress=False)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        logits = model(images)
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(metrics["accuracy"])
    assert torch.nn.functional.cross_entropy(logits, labels).item() == pytest.approx(metrics["loss"], rel=1e-5)


def test_layers_to_adapt_can_be_named_and_models_without_linear_layers_ask_for_it(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*arguments, "--model", "test_resnet", "--epochs", "1", "--plots", "false"]
    assert command_line(words) == 2
    said = capsys.readouterr().err
    assert "--target-modules: ImageClassifier has no layer to adapt" in said
    assert "such as 'model.conv1.0'" in said
    assert "head=" not in said, "which is no option of this command"
    metrics = main([*words, "--target-modules", "layer1,model.layer2.0.conv1"])
    assert list(metrics["ranks"]) == [f"model.layer{n}" for n in ("1.0.conv1", "1.0.conv2", "2.0.conv1")]
    assert metrics["experiment"]["target_modules"] == ["layer1", "model.layer2.0.conv1"]
    with pytest.raises(ValueError, match=r"holds another run, with target_modules=\['layer1', .*\] \(now None\)"):
        main(words)


def test_runs_keep_the_identity_they_had_before_layers_could_be_named() -> None:
    """Computed by the version before."""
    assert RunFolder("x", Settings(root="x", task="caltech101")).id == "7f1a886271d738c9"
    assert RunFolder("x", finetune.Settings(task=("push-v3",), init="x")).id == "4cdecd1af9f6d225"
    assert RunFolder("x", Settings(root="x", task="caltech101", target_modules=("qkv",))).id != "7f1a886271d738c9"


def test_learns_colours(arguments: list[str]) -> None:
    metrics = main([*arguments, "--method", "fft", "--epochs", "15", "--lr", "3e-3"])
    assert metrics["accuracy"] >= 0.75
    assert "ranks" not in metrics


def test_tuning_protocol_records_validation_per_epoch(arguments: list[str], tmp_path: Path) -> None:
    metrics = main([*arguments, "--split", "train800", "--method", "lora"])
    assert (metrics["evaluation_split"], metrics["evaluation_images"]) == ("val200", 8)
    with (tmp_path / "runs/run/metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[-1]["val_accuracy"]) == pytest.approx(metrics["accuracy"])


def test_finished_run_is_reported_not_repeated(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = main([*arguments, "--method", "linear", "--limit-test", "5"])
    assert first["limited"]
    with monkeypatch.context() as patch:
        patch.setattr(vision_module, "create_backbone", no_model)
        assert main([*arguments, "--method", "linear", "--limit-test", "5"]) == first
    assert "is finished already (--overwrite runs it again): kitti test accuracy" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds another run, with .*lr=0\.001 \(now 0\.01\).*--overwrite"):
        main([*arguments, "--method", "linear", "--limit-test", "5", "--lr", "0.01"])
    again = main([*arguments, "--method", "linear", "--lr", "0.01", "--overwrite"])
    assert again["lr"] == 0.01
    assert not again["limited"]


def test_interrupted_run_is_resumed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = main([*arguments, "--name", "whole"])
    step = vision_module.ImageClassifier.training_step

    def power_cut(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(vision_module.ImageClassifier, "training_step", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            main(arguments)
    assert not (tmp_path / "runs/run/metrics.json").exists()
    capsys.readouterr()
    resumed = main(arguments)
    assert "resuming from" in capsys.readouterr().out
    assert (resumed["accuracy"], resumed["loss"], resumed["ranks"]) == (
        whole["accuracy"], whole["loss"], whole["ranks"],
    )  # fmt: skip


def test_failure_before_the_first_checkpoint_does_not_take_the_name(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patch size 16"):
        main([*arguments, "--image-size", "40"])
    assert not (tmp_path / "runs/run").exists()
    (tmp_path / "data/kitti/images/test_004.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"test_004\.jpg cannot be decoded"):
        main([*arguments, "--epochs", "1", "--method", "linear"])
    (tmp_path / "data/kitti/images/test_004.jpg").write_bytes(
        (tmp_path / "data/kitti/images/test_000.jpg").read_bytes()
    )
    assert main([*arguments, "--epochs", "1", "--method", "linear"])["epochs"] == 1
    with pytest.raises(ValueError, match=r"holds another run, with .*epochs=1 \(now 2\)"):
        main([*arguments, "--method", "linear"])


def test_weight_file_and_accumulation(arguments: list[str], tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), tmp_path / "w.pth")
    metrics = main([*arguments, "--weights", str(tmp_path / "w.pth"), "--accumulate", "2"])
    assert metrics["weights"].endswith("w.pth")


def test_ctrl_c_says_how_to_go_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(self: Any, batch: Any, batch_idx: int) -> Any:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(vision_module.ImageClassifier, "training_step", ctrl_c)
        assert command_line(arguments) == 130
    assert signal.getsignal(signal.SIGINT) == handler
    assert "interrupted after 0 of 2 epochs; rerun to resume" in capsys.readouterr().out
    assert main(arguments)["epochs"] == 2


def test_published_config_is_the_papers_protocol() -> None:
    file = ROOT / "configs/vtab/dinov2_g14_eva.yaml"
    settings = parse(["--config", str(file), "--root", "x", "--task", "caltech101"])
    assert settings == Settings(root="x", task="caltech101")


def test_config_file(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"lr": 0.5, "batch_size": 4, "method": "dora"}))
    settings = parse(["--config", str(tmp_path / "config.yaml"), *arguments])
    assert (settings.lr, settings.method, settings.batch_size) == (0.5, "dora", 8)


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ("--task kiti", ValueError, "unknown VTAB-1K task 'kiti': did you mean kitti"),
        ("--task dmlab", FileNotFoundError, "has no folder dmlab"),
        ("--model tst_vit", ValueError, "unknown model 'tst_vit': did you mean test_vit"),
        ("--method eva-doro", ValueError, "unknown method 'eva-doro': did you mean eva-dora"),
        ("--weights nowhere.pth", FileNotFoundError, r"weight file nowhere\.pth does not exist"),
        ("--split test", ValueError, "unknown split 'test'"),
        ("--rho 0.5", ValueError, r"rho must be a number of at least 1, got 0\.5"),
        ("--metric rato", ValueError, "ratio"),
        ("--tau 2", ValueError, "tau"),
        ("--rank 0", ValueError, "rank must be a whole number of at least 1, got 0"),
        ("--epochs 0", ValueError, "epochs must be a whole number of at least 1, got 0"),
        ("--lr -1", ValueError, r"lr must be a number above 0, got -1\.0"),
        ("--accumulate 3", ValueError, "accumulate must divide batch_size 8, got 3"),
        ("--precision 8", ValueError, "unknown precision '8'"),
        ("--normalization imagnet", ValueError, "unknown normalization 'imagnet': did you mean imagenet"),
        ("--seed -1", ValueError, "seed must be a whole number of at least 0 and below .*, got -1"),
        ("--name a/b", ValueError, "name must be the plain name of a file or folder, got 'a/b'"),
    ],
)
def test_bad_input_is_said_before_a_model_is_built(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extra: str,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(vision_module, "create_backbone", no_model)
    with pytest.raises(error, match=message):
        main([*arguments, *extra.split()])
    assert not (tmp_path / "runs/run").exists()


def test_terminal_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["--root", str(tmp_path / "none"), "--task", "kitti"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: the VTAB-1K folder")
    assert len(sentence.splitlines()) == 1


def test_more_devices_than_there_are_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line([*arguments, "--devices", "99999"]) == 2
    assert "of this machine, got 99999" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_one_sentence(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").write_text("a file")
    assert command_line(arguments) == 2
    assert capsys.readouterr().err == f"error: cannot write to {tmp_path / 'runs/run'}: not a directory\n"


def test_damaged_run_folder_is_named(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(asdict(parse(arguments))))
    (run / "metrics.json").write_text("{}")
    (run / "config.yaml").write_text("{[")
    with pytest.raises(ValueError, match=r"holds a config\.yaml that this program has not written: move it away"):
        main(arguments)


@pytest.mark.skipif(not (SHARED / "caltech101").is_dir(), reason="the shared Caltech101 folder is not on this machine")
def test_real_caltech101(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        f"--root {SHARED} --task caltech101 --model test_vit --weights none --image-size 32 --rank 4 --epochs 2 "
        f"--accelerator cpu --limit-train 256 --limit-test 128 --output {tmp_path}"
    )
    metrics = main(text.split())
    assert metrics["limited"]
    (warning,) = metrics["warnings"]
    assert warning.startswith(
        "caltech101/test.txt lists 6084 images where VTAB-1K has 6085: results are not comparable"
    )
    assert sum(metrics["ranks"].values()) == 4 * len(metrics["ranks"])
    assert 0 <= metrics["accuracy"] <= 1
