"""ImageFolderDataModule: parts of a folder, and a plain Trainer with EVA on it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score
from torchvision.datasets import ImageFolder

from eva_lightning import EVAInitCallback
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision import ImageClassifier, ImageFolderDataModule
from tests.eva_lightning.vision.fakes import make_task

CLASSES = ("ash", "Birch", "oak")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of unequal sizes; the colour tells the class."""
    place, noise = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for channel, (name, count) in enumerate(zip(CLASSES, (20, 12, 8), strict=True)):
        (place / name / "more").mkdir(parents=True)
        for index in range(count):
            pixels = noise.integers(0, 120, (24, 30, 3), dtype=np.uint8)
            pixels[:, :, channel] += 100
            where = place / name / ("more" if index % 2 else ".")
            Image.fromarray(pixels).save(where / f"{index:02d}.jpg")
    return place


def quiet(folder: Path, **options: object) -> ImageFolderDataModule:
    return ImageFolderDataModule(folder, image_size=32, batch_size=8, progress=False, **options)  # type: ignore[arg-type]


def test_labels_are_torchvisions_and_every_class_is_divided_alike(folder: Path) -> None:
    data, reference = quiet(folder), ImageFolder(str(folder))
    assert list(data.class_names) == reference.classes
    labels = {Path(path).relative_to(folder).as_posix(): label for path, label in reference.samples}
    parts = (data.data.train, data.data.validation, data.data.evaluation)
    found = {path: label for part in parts if part for path, label in zip(part.paths, part.labels, strict=True)}
    assert found == labels
    names = {label: reference.classes[label] for label in range(3)}
    sizes = [{names[label]: count for label, count in Counter(part.labels).items()} for part in parts if part]
    assert sizes == [
        {"ash": 12, "Birch": 7, "oak": 5}, {"ash": 3, "Birch": 2, "oak": 1}, {"ash": 5, "Birch": 3, "oak": 2},
    ]  # fmt: skip


def test_the_seed_draws_and_shares_hold(folder: Path) -> None:
    first, again, other = quiet(folder), quiet(folder), quiet(folder, split_seed=1)
    assert first.data.evaluation == again.data.evaluation
    assert set(first.data.evaluation.paths) != set(other.data.evaluation.paths)
    assert Counter(first.data.evaluation.labels) == Counter(other.data.evaluation.labels)
    half = quiet(folder, test_share=0.5, val_share=0.9)
    assert sorted(Counter(half.data.evaluation.labels).values()) == [4, 6, 10]
    assert sorted(Counter(half.data.train.labels).values()) == [1, 1, 1]


def test_held_out_images_train_when_nothing_validates(folder: Path) -> None:
    data, whole = quiet(folder), quiet(folder, hold_out=False)
    assert data.data.validation is not None
    assert set(whole.data.train.paths) == {*data.data.train.paths, *data.data.validation.paths}
    assert whole.data.evaluation.paths == data.data.evaluation.paths
    assert (whole.val_dataloader(), whole.validates) == ([], False)


def test_a_plain_trainer_with_eva_trains_validates_tests_and_predicts(folder: Path) -> None:
    L.seed_everything(0, verbose=False)
    data = quiet(folder)
    module = ImageClassifier("test_vit", data.num_classes, image_size=32, lr=1e-2)
    eva = EVAInitCallback(rho=2, r=4, verbose=False)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[eva], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert eva.state is not None
    assert len(set(eva.state.ranks.values())) > 1
    assert "val_accuracy" in trainer.callback_metrics
    tested = trainer.test(module, data, verbose=False)[0]
    logits = trainer.predict(module, data)
    assert logits is not None
    predicted = torch.cat([torch.as_tensor(batch) for batch in logits]).argmax(dim=1)
    assert tested["test_accuracy"] == pytest.approx(accuracy_score(data.data.evaluation.labels, predicted))
    validating = quiet(folder, evaluation="val")
    judged = trainer.test(module, validating, verbose=False)[0]
    assert judged["test_loss"] == pytest.approx(float(trainer.validate(module, data, verbose=False)[0]["val_loss"]))


def test_split_files_of_vtab_name_their_classes(tmp_path: Path) -> None:
    place = make_task(tmp_path, "mine", classes=3)
    assert quiet(place).class_names == ("0", "1", "2")
    (place / "classes.txt").write_text("0 ash\n1 birch\n2 oak\n")
    data = quiet(place)
    assert data.class_names == ("ash", "birch", "oak")
    (place / "classes.txt").write_text("african elephant\nasian elephant\n2 oaks\n")
    assert quiet(place).class_names == ("african elephant", "asian elephant", "2 oaks")
    assert [len(part) for part in (data.data.train, data.data.evaluation)] == [16, 12]
    # a folder of one's own may have the name of a VTAB-1K task
    assert quiet(make_task(tmp_path / "b", "kitti")).num_classes == 4


def test_what_cannot_be_used_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"there is no folder of images .*none"):
        quiet(tmp_path / "none")
    for name, value in (("test_share", 0), ("test_share", 1.0), ("val_share", -1), ("split_seed", -1)):
        with pytest.raises(InputError, match=f"{name} must be"):
            quiet(folder, **{name: value})
    with pytest.raises(InputError, match="evaluation on val needs hold_out"):
        quiet(folder, evaluation="val", hold_out=False)
    with pytest.raises(InputError, match="unknown evaluation 'valid'"):
        quiet(folder, evaluation="valid")
    for part in ("train", "val", "test"):
        for name in ("x", "y"):
            (tmp_path / "t" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "t" / part / name / "0.png")
    os.link(tmp_path / "t/val/x/0.png", tmp_path / "t/test/x/1.png")
    with pytest.raises(InputError, match=r"test/x/1\.png, listed in test, is also validated on"):
        quiet(tmp_path / "t")
