from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.data.splits import Split
from experiments.vtab import transfer, transfer_data, transfer_model, transfer_report, transfer_runs
from experiments.vtab.transfer_report import paired
from experiments.vtab.transfer_runs import Job, Variant
from tests.eva_lightning.vision.fakes import make_task
from tests.paths import ROOT

CONFIG = ROOT / "configs" / "vtab" / "transfer.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of eight classes."""
    folder = tmp_path_factory.mktemp("vtab-1k")
    make_task(folder, "caltech101", classes=8, counts={"train800": 32, "val200": 16, "test": 48})
    return folder


@pytest.fixture(scope="module")
def pretrained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder that holds pre-trained weights and nothing else."""
    output = tmp_path_factory.mktemp("pretrained")
    settings = transfer.parse(command(root, output))
    transfer._pretrain(settings)
    return output


def command(root: Path, output: Path, *more: str) -> list[str]:
    options = {
        "root": root, "output": output, "methods": "lora,eva:1", "seeds": 2, "rank": 2, "epochs": 2, "looks": "1",
        "batch-size": 8, "grid": "1e-3,1e-2", "extend": 0, "train-images": 16, "validation-images": 6,
        "pretrain-epochs": 1, "workers": 0, "progress": "false",
    }  # fmt: skip
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def images(counts: Sequence[int]) -> Split:
    """Names of images, so many per class."""
    named = [(f"images/c{label}/{index}.jpg", label) for label, n in enumerate(counts) for index in range(n)]
    return Split("all", Path("nowhere"), tuple(path for path, _ in named), tuple(label for _, label in named))


def dataset(pixels: torch.Tensor, labels: Sequence[int]) -> SplitDataset:
    split = Split("some", Path("nowhere"), tuple(map(str, labels)), tuple(labels))
    return SplitDataset(split, pixels.shape[-1], pixels.numpy())


def test_halves_share_no_class_and_no_image() -> None:
    counts = [400, 300, *range(12, 112)]
    found = transfer_data.split_halves(images(counts), seed=3)
    parts = [found.pretraining, found.held_out, found.train, found.test]
    paths = [path for part in parts for path in part.paths]
    assert len(paths) == len(set(paths)) == sum(counts)
    assert set(found.train.paths) == {*found.tuning.paths, *found.validation.paths}
    assert (len(found.tuning), len(found.validation), found.classes) == (800, 200, (51, 51))
    classes = [{path.split("/")[1] for path in part.paths} for part in parts]
    assert classes[0] == classes[1]
    assert classes[2] == classes[3]
    assert not classes[0] & classes[2]
    # neighbours in size are on different sides, so that the halves are about as large
    assert len({"c0", "c1"} & classes[0]) == 1
    first = len(found.pretraining) + len(found.held_out)
    assert abs(first - (sum(counts) - first)) <= 100 + 50
    # no class gives more than half of its images
    train, test = Counter(found.train.labels), Counter(found.test.labels)
    assert all(0 < train[label] <= test[label] for label in range(51))
    assert max(train.values()) - 1 <= sorted(train.values())[-2] <= max(train.values())


def test_a_split_is_that_of_its_seed() -> None:
    some = images([20] * 10)
    reordered = Split("all", some.folder, some.paths[::-1], some.labels[::-1])
    assert transfer_data.split_halves(some, 1, 40, 10) == transfer_data.split_halves(reordered, 1, 40, 10)
    assert transfer_data.split_halves(some, 1, 40, 10) != transfer_data.split_halves(some, 2, 40, 10)


def test_validation_images_are_like_the_others() -> None:
    # one class far larger than the others: its images must not gather at one end of the order
    for seed in range(3):
        found = transfer_data.split_halves(images([4000, 4000, *([40] * 98)]), seed)
        share = Counter(found.validation.labels)
        assert len(share) > 40
        expected = Counter(found.train.labels)[0] / 5
        assert abs(share[0] - expected) < 4 * math.sqrt(expected)


def test_crops_at_full_size_are_the_image_or_its_mirror() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(32, 3, 12, 12, generator=generator)
    cropped = transfer_data.random_crops(pixels, 12, generator, least_area=1.0)
    same = torch.isclose(cropped, pixels, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(cropped, pixels.flip(3), atol=1e-5).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 4 < int(same.sum()) < 28
    # on a ramp, a crop of a quarter of the area spans half of the values, and stays inside
    ramp = torch.arange(64.0).expand(200, 3, 64, 64).contiguous()
    quarter = transfer_data.random_crops(ramp, 32, generator, least_area=0.25)
    spans = quarter.amax((1, 2, 3)) - quarter.amin((1, 2, 3))
    assert spans.min() > 0.4 * 64
    assert spans.max() < 64
    assert quarter.min() >= 0
    assert quarter.max() <= 63


def test_jitter_of_nothing_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 5, 5, generator=generator)
    torch.testing.assert_close(transfer_data.random_jitter(pixels, generator, most=0.0), pixels)
    grey = pixels.mean(1, keepdim=True).expand_as(pixels)
    jittered = transfer_data.random_jitter(grey, generator)
    torch.testing.assert_close(jittered[:, 0], jittered[:, 2])  # grey stays grey
    assert not torch.allclose(jittered, grey)


def test_held_out_figures_are_those_of_torchmetrics() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    labels = [0] * 30 + [1] * 15 + [2] * 5
    data = dataset(pixels, labels)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(48, 3)).train()
    found = transfer_model.held_out(module, data, batch_size=7)
    assert module.training
    inputs, truth = data.__getitems__(range(50))
    logits = module[2](module[0](inputs)).detach()
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, truth)), rel=1e-5)
    micro, macro = MulticlassAccuracy(3, average="micro"), MulticlassAccuracy(3, average="macro")
    assert found["accuracy"] == pytest.approx(float(micro(logits, truth)), rel=1e-5)
    assert found["class_accuracy"] == pytest.approx(float(macro(logits, truth)), rel=1e-5)


def test_merging_for_a_look_changes_no_figure() -> None:
    from eva_lightning.methods.vision import AdapterOptions, apply_method
    from eva_lightning.vision.module import ImageClassifier

    torch.manual_seed(0)
    module = ImageClassifier(transfer_model.MODEL, 3, transfer_model.IMAGE_SIZE)
    apply_method("dora", module, AdapterOptions(rank=2))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    data = dataset(torch.randint(0, 256, (20, 3, 48, 48), dtype=torch.uint8), [0, 1] * 10)
    merged = transfer_model._merged(module.model)
    assert transfer_model.held_out(merged, data) == pytest.approx(transfer_model.held_out(module, data), rel=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_grid_grows_until_the_best_rate_is_inside() -> None:
    optimum = {"lora": 1.5e-3, "eva:1": 4e-2, "fft": 1e-5}
    settings = transfer.parse(["--methods=lora,eva:1,fft", "--extend=2", "--tune-seeds=2", "--grid=1e-3,3e-3,1e-2"])
    asked: list[Job] = []

    def stage(title: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        asked.extend(jobs)
        return [
            {"variant": j.variant, "lr": j.lr, "looks": [{"loss": math.log(j.lr / optimum[j.variant]) ** 2}]}
            for j in jobs
        ]

    scores = transfer.tune(settings, "digest", stage)
    assert {key: sorted(worth) for key, worth in scores.items()} == {
        "lora": [3e-4, 1e-3, 3e-3, 1e-2],
        "eva:1": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "fft": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2],  # stopped by extend
    }
    assert transfer.best_rates(settings, scores) == {"lora": 1e-3, "eva:1": 3e-2, "fft": 1e-4}
    assert {job.seed for job in asked} == {100, 101}
    assert {job.phase for job in asked} == {"tuning"}
    assert len(asked) == len(set(asked)) == 2 * (4 + 5 + 5)


def test_a_rate_that_diverged_or_failed_is_not_taken() -> None:
    settings = transfer.parse(["--methods=lora,eva:1", "--extend=0", "--tune-seeds=2", "--grid=1e-3,1e-2"])

    def stage(title: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        found = []
        for job in jobs:
            if job.variant == "eva:1" or (job.lr, job.seed) == (1e-2, 101):
                continue  # failed
            found.append({"variant": job.variant, "lr": job.lr, "looks": [{"loss": 1.0 if job.lr == 1e-3 else 0.1}]})
        return found

    scores = transfer.tune(settings, "digest", stage)
    assert transfer.best_rates(settings, scores) == {"lora": 1e-3}
    assert [job.variant for job in transfer.final_jobs(settings, {"lora": 1e-3}, "digest")] == ["lora"] * 6


def test_differences_are_taken_within_a_seed() -> None:
    runs = [{"variant": v, "seed": s, "x": s + d} for s in range(4) for v, d in (("eva", 0.5), ("lora", 0.0))]
    found = paired(runs, "eva", "lora", lambda run: run["x"])
    assert found is not None
    assert (found.mean, found.half, found.n) == (0.5, 0.0, 4)
    assert paired(runs[:-1], "eva", "lora", lambda run: run["x"]).n == 3  # type: ignore[union-attr]
    assert paired(runs, "dora", "lora", lambda run: run["x"]) is None


def test_bonferroni_widens_the_interval() -> None:
    from scipy.stats import ttest_1samp

    from experiments.runner.statistics import Interval

    values = [0.9, 1.1, 1.4, 0.6, 1.2, 0.3]
    p = ttest_1samp(values, 0.0).pvalue
    comparisons = int(0.05 / p)
    assert comparisons > 10
    assert transfer_report._remains(Interval.of(values), comparisons)
    assert not transfer_report._remains(Interval.of(values), comparisons + 1)


def test_pretraining_goes_on_where_it_was_ended(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    found = transfer_runs.halves(str(root), 0, 16, 6)
    train = transfer_data.decoded(found.pretraining, transfer_model.CROPPED_FROM, tmp_path)
    look = transfer_data.decoded(found.held_out, transfer_model.IMAGE_SIZE, tmp_path)
    recipe = transfer_model.Pretraining(epochs=3, batch_size=16)
    whole, metrics = transfer_model.pretrain(recipe, 4, train, look, tmp_path / "whole")
    start = transfer_model._Clock.on_train_epoch_start

    def power_cut(self: Any, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("power cut")
        start(self, trainer, pl_module)

    monkeypatch.setattr(transfer_model._Clock, "on_train_epoch_start", power_cut)
    with pytest.raises(RuntimeError, match="power cut"):
        transfer_model.pretrain(recipe, 4, train, look, tmp_path / "cut")
    assert not (tmp_path / "cut" / "backbone.safetensors").exists()
    monkeypatch.setattr(transfer_model._Clock, "on_train_epoch_start", start)
    resumed, again = transfer_model.pretrain(recipe, 4, train, look, tmp_path / "cut")
    assert [row["epoch"] for row in again["held_out"]] == [row["epoch"] for row in metrics["held_out"]] == [1, 2, 3]
    first, second = load_file(whole), load_file(resumed)
    assert "head.weight" not in first
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
    # finished, it is taken as it is; another recipe is refused
    assert transfer_model.pretrain(recipe, 4, train, look, tmp_path / "cut") == (resumed, again)
    with pytest.raises(ValueError, match="holds another run"):
        transfer_model.pretrain(transfer_model.Pretraining(epochs=4), 4, train, look, tmp_path / "cut")


def test_the_experiment_can_be_killed_anywhere(
    root: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(root, pretrained)
    run, count = transfer_runs.run, iter(range(100))

    def power_cut(job: Job) -> dict[str, Any]:
        if next(count) == 5:
            raise KeyboardInterrupt
        return run(job)

    monkeypatch.setattr(transfer_runs.run_all, "__defaults__", (power_cut,))
    with pytest.raises(KeyboardInterrupt):
        transfer.main(line)
    monkeypatch.setattr(transfer_runs.run_all, "__defaults__", (run,))
    assert len(list(pretrained.glob("*/*/metrics.json"))) == 5
    assert [(run["variant"], run["seed"]) for run in transfer.main([*line, "--report"])] == [("lora", 0)]
    assert "**Unfinished:** 1 of 4 runs." in (pretrained / "report.md").read_text()
    results = transfer.main(line)
    assert "comparison: 1 of 4 runs are finished" in capsys.readouterr().out
    assert [(r["variant"], r["seed"]) for r in results] == [("lora", 0), ("eva:1", 0), ("lora", 1), ("eva:1", 1)]
    assert [row["epoch"] for row in results[0]["looks"]] == [1, 2]
    with (pretrained / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["loss_2"]) for row in rows] == [run["looks"][-1]["loss"] for run in results]
    report = (pretrained / "report.md").read_text()
    assert "| EVA ρ=1 | " in report
    assert "on the same 16 images of the other 4 classes" in report
    assert "It is tested on the 32 other images" in report
    assert "Still at an edge" in report
    for name in ("curves.png", "differences.png"):
        assert (pretrained / name).is_file()
    # finished, it is written anew
    assert transfer.main(line) == results
    assert (pretrained / "report.md").read_text() == report
    with pytest.raises(ValueError, match="holds another run, with epochs=2"):
        transfer.main([*line, "--epochs=1"])


def test_a_failed_run_is_reported_and_tried_again(
    root: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = command(root, pretrained, "--methods=linear,linear-random,scratch", "--seeds=1", "--epochs=1", "--looks=")
    line.append("--rates=linear=0.03,linear-random=0.03,scratch=0.003")
    run = transfer_runs.run

    def breaks(job: Job) -> dict[str, Any]:
        if job.variant == "scratch":
            raise RuntimeError("out of luck")
        return run(job)

    monkeypatch.setattr(transfer_runs.run_all, "__defaults__", (breaks,))
    assert len(transfer.main(line)) == 2
    assert "- Scratch (FFT), lr 0.003, seed 0: RuntimeError: out of luck" in (pretrained / "report.md").read_text()
    (record,) = pretrained.glob("runs/*/error.txt")
    monkeypatch.setattr(transfer_runs.run_all, "__defaults__", (run,))
    linear, random, scratch = transfer.main(line)
    assert not record.exists()
    assert linear["trainable_parameters"] == random["trainable_parameters"] == 4 * 64 + 4
    assert scratch["trainable_parameters"] > 200_000
    assert linear["looks"] != random["looks"]


@pytest.mark.slow
def test_processes_give_what_one_process_gives(root: Path, pretrained: Path, tmp_path: Path) -> None:
    import shutil

    more = ("--methods=lora,eva-dora:2", "--seeds=1", "--rates=lora=0.01,eva-dora=0.01")
    for name in ("one", "two"):
        shutil.copytree(pretrained / "pretraining", tmp_path / name / "pretraining")
    alone = transfer.main(command(root, tmp_path / "one", *more))
    together = transfer.main(command(root, tmp_path / "two", *more, "--workers=2"))
    for first, second in zip(alone, together, strict=True):
        for a, b in zip(first["looks"], second["looks"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_the_plan_runs_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert transfer.main(command(root, tmp_path / "out", "--plan")) == []
    printed = capsys.readouterr().out
    assert "comparison: 4 runs (2 methods x 2 seeds) on 16 images of 4 classes, 32 to test on" in printed
    assert "estimate: " in printed
    assert not (tmp_path / "out").exists()


def test_the_config_that_is_shipped() -> None:
    from eva_lightning.methods.keys import METHOD_TRAITS

    settings = transfer.parse([f"--config={CONFIG}"])
    assert {variant.method for variant in settings.variants} == {*METHOD_TRAITS, None}
    assert {"eva", "eva:1", "scratch", "linear-random"} < {variant.key for variant in settings.variants}
    assert settings.seeds >= 3
    # the defaults are the same, so the command alone does it
    assert settings == transfer.parse([])
    assert Variant.parse("eva:2").key == "eva"
    assert Variant.parse("eva:2").label == "EVA ρ=2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--methods=lora,evva:2", "unknown method 'evva:2': did you mean eva"),
        ("--methods=lora,eva:0.5", "rho of eva must be a number of at least 1, got 0.5"),
        ("--methods=eva,eva:2", "methods must be named, and differ"),
        ("--grid=fast", "grid must be numbers with commas between them, got 'fast'"),
        ("--grid=0,1e-3", "grid must be learning rates above 0"),
        ("--looks=0,2", "looks must be epochs from 1, got '0,2'"),
        ("--rates=lora:x", "what follows the colon in 'lora:x' must be rho"),
        ("--rates=lora=x", "rates must be written as lora=0.01"),
        ("--seeds=0", "seeds must be at least 1, got 0"),
        ("--root=nowhere", "needs the caltech101 folder of VTAB-1K"),
        ("--train-images=30", "has 24 images to fine-tune on (half of those of 4 classes), but 30 are asked for"),
        ("--validation-images=16", "validation images must be from 1 to 15 of the 16 training images, got 16"),
        ("--report", "nothing is finished yet"),
    ],
)
def test_bad_input_is_one_sentence(
    change: str, message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transfer.command_line(command(root, tmp_path / "bad", change)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_an_image_with_two_labels_or_none_there(root: Path, tmp_path: Path) -> None:
    folder = make_task(tmp_path, "caltech101", classes=4)
    lines = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join([*lines, "images/train800_000.jpg 3"]) + "\n")
    with pytest.raises(ValueError, match=r"train800_000\.jpg is listed with the labels 0 and 3"):
        transfer_data.read_images(tmp_path)
    (folder / "test.txt").write_text("\n".join([*lines, "images/gone.jpg 3"]) + "\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg is missing \(1 of 37 are\)"):
        transfer_data.read_images(tmp_path)


def test_batches_come_in_the_order_of_the_seed() -> None:
    data = dataset(torch.zeros(10, 3, 4, 4, dtype=torch.uint8), list(range(10)))
    orders = [
        torch.cat([labels for _, labels in transfer_data.TransferData(data, 4, seed).train_dataloader()]).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10))
    assert np.diff(orders[0]).tolist() != [1] * 9
