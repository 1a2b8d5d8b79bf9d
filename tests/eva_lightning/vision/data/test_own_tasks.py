"""Folders of images that are none of VTAB-1K's tasks, in every layout that is read, and what is refused."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.data import own_tasks
from eva_lightning.vision.data.datamodule import VTAB1K
from eva_lightning.vision.data.decoding import image_files
from eva_lightning.vision.data.image_folder import ImageFolderDataModule
from eva_lightning.vision.data.own_tasks import find_task, read_own_task
from eva_lightning.vision.data.splits import open_folder, open_task
from eva_lightning.vision.data.tasks import TASKS
from experiments.finetune.settings import Settings
from experiments.runner.run_folder import RunFolder
from tests.eva_lightning.vision.fakes import make_task


def images(folder: Path, count: int, suffix: str = ".png", kind: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.full((8, 8, 3), (9 * index) % 256, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}{suffix}", kind)


def test_official_names_stay_official(tmp_path: Path) -> None:
    assert find_task(tmp_path, "kitti") is TASKS["kitti"]


@pytest.mark.parametrize("below", [".", "images"], ids=["here", "images"])
def test_class_folders_give_a_quarter_for_test_and_a_fifth_of_the_rest_for_validation(
    tmp_path: Path, below: str
) -> None:
    for name, count in {"cat": 40, "dog": 20, "owl": 3}.items():
        images(tmp_path / "pets" / below / name, count)
    (tmp_path / "pets" / below / "empty").mkdir()
    own = read_own_task(tmp_path / "pets")
    assert own.classes == ("cat", "dog", "owl")
    per_class = {
        split: [sum(label == wanted for _, label in part) for wanted in range(3)] for split, part in own.splits.items()
    }
    assert per_class == {
        "test": [10, 5, 1],
        "val200": [6, 3, 1],
        "train800": [24, 12, 1],
        "train800val200": [30, 15, 2],
    }
    parts = [{path for path, _ in own.splits[name]} for name in ("train800", "val200", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 63
    assert set(own.splits["train800val200"]) == {*own.splits["train800"], *own.splits["val200"]}


def test_a_copy_elsewhere_has_the_same_splits(tmp_path: Path) -> None:
    for root in ("a", "b"):
        for name in ("x", "y"):
            images(tmp_path / root / "t" / name, 12)
    assert read_own_task(tmp_path / "a" / "t") == read_own_task(tmp_path / "b" / "t")


@pytest.mark.parametrize("with_val", [True, False], ids=["val", "no val"])
def test_train_and_test_folders_are_kept_apart(tmp_path: Path, with_val: bool) -> None:
    for name in ("x", "y"):
        images(tmp_path / "t" / "train" / name, 10)
        images(tmp_path / "t" / "test" / name, 4)
        if with_val:
            images(tmp_path / "t" / "val" / name, 3)
    own = read_own_task(tmp_path / "t")
    sizes = {split: len(part) for split, part in own.splits.items()}
    assert sizes == (
        {"train800": 20, "val200": 6, "train800val200": 26, "test": 8}
        if with_val
        else {"train800": 16, "val200": 4, "train800val200": 20, "test": 8}
    )
    assert all(path.startswith("test/") for path, _ in own.splits["test"])
    assert not any(path.startswith("test/") for path, _ in own.splits["train800val200"])


@pytest.mark.parametrize("below", [".", "images"], ids=["here", "images"])
@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAINING", "valid")], ids="-".join)
def test_parts_are_known_in_any_case_and_below_images(tmp_path: Path, names: tuple[str, str], below: str) -> None:
    for part, count in zip(names, (10, 4), strict=True):
        for name in ("x", "y"):
            images(tmp_path / below / part / name, count)
    (tmp_path / below / "latest").symlink_to("gone")  # beside parts, whatever else is there is nobody's business
    own = read_own_task(tmp_path)
    assert own.classes == ("x", "y")
    assert {split: len(part) for split, part in own.splits.items()} == {
        "train800": 16, "val200": 4, "train800val200": 20, "test": 8,
    }  # fmt: skip
    assert all(names[1] in Path(path).parts for path, _ in own.splits["test"])


def test_split_files_and_the_classes_they_name(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "mine", classes=3)
    assert (find_task(tmp_path, "mine").classes, find_task(tmp_path, "mine").group) == (3, "other")
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    assert find_task(tmp_path, "mine").classes == 4
    (folder / "classes.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"classes\.txt names 2 classes, but a label is 2"):
        find_task(tmp_path, "mine")


def test_a_data_module_reads_any_folder_and_says_that_it_is_not_comparable(tmp_path: Path) -> None:
    for name in ("x", "y"):
        images(tmp_path / "mine" / name, 12, ".jpg")
    data = VTAB1K(tmp_path, "mine", image_size=8, batch_size=6, progress=False)
    data.setup("fit")
    pixels, labels = next(iter(data.train_dataloader()))
    assert (pixels.shape, set(labels.tolist())) == ((6, 3, 8, 8), {0, 1})
    assert (data.num_classes, data.data.comparable) == (2, False)
    assert data.data.warnings == (
        "mine is none of VTAB-1K's tasks: 2 classes and the splits are those of its folder",
    )
    tuning = open_task(tmp_path, "mine", "train800")
    assert not set(tuning.train.paths) & set(data.data.evaluation.paths)


def test_what_cannot_be_a_task_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown VTAB-1K task 'kiti': did you mean kitti.*nor is it a folder"):
        find_task(tmp_path, "kiti")
    with pytest.raises(InputError, match="task must be"):
        find_task(tmp_path, "../mine")
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingInputError, match="none holds no images that are sorted by class"):
        find_task(tmp_path, "none")
    images(tmp_path / "one" / "x", 9)
    with pytest.raises(InputError, match="one has one class, 'x': there is nothing to tell apart"):
        find_task(tmp_path, "one")
    images(tmp_path / "few" / "x", 9)
    images(tmp_path / "few" / "y", 2)
    with pytest.raises(InputError, match="class y of .*few has 2 images, and 3 are needed"):
        find_task(tmp_path, "few")
    images(tmp_path / "new" / "x", 9)
    images(tmp_path / "new" / "y", 9, ".webp")
    with pytest.raises(InputError, match=r"000\.webp is of a format that is not read: convert it to JPEG"):
        find_task(tmp_path, "new")
    for name in ("x", "y"):
        images(tmp_path / "gap" / "train" / name, 5)
    images(tmp_path / "gap" / "test" / "x", 5)
    with pytest.raises(InputError, match="class y of .*gap has no test image"):
        find_task(tmp_path, "gap")
    images(tmp_path / "strange" / "train" / "x", 5)
    images(tmp_path / "strange" / "train" / "y", 5)
    for name in ("x", "y", "z"):
        images(tmp_path / "strange" / "test" / name, 5)
    with pytest.raises(InputError, match="class z of .*strange has images to test or validate, but none to train"):
        find_task(tmp_path, "strange")


def two(folder: Path, names: tuple[str, str] = ("x", "y")) -> Path:
    for name in names:
        images(folder / name, 8)
    return folder


def _bytes_that_are_no_text(folder: Path) -> None:
    source = (folder / "x" / "000.png").read_bytes()
    with open(os.fsencode(folder / "x") + b"/\xff.png", "wb") as file:
        file.write(source)


def _parts(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for place in folder.iterdir():
            shutil.rmtree(place)
        for part in names:
            two(folder / part)

    return make


def _unlabelled(folder: Path) -> None:
    _parts("train", "val")(folder)
    images(folder / "test", 3)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a link to the folder itself": (
        lambda r: (r / "loop").symlink_to(r), "class folder .*loop is a link to .*mine, which holds it: remove the link"),
    "a link to another class": (
        lambda r: (r / "z").symlink_to(r / "x"), "the class folders .*x and .*z are one: remove the link"),
    "a link round to itself": (lambda r: (r / "z").symlink_to(r / "z"), "z is a link that leads nowhere: put the folder"),
    "a class that is gone": (lambda r: (r / "z").symlink_to(r / "gone"), "z is a link that leads nowhere"),
    "an image that is gone": (
        lambda r: (r / "x/new.png").symlink_to("gone.png"), "the image .*new.png is a link that leads nowhere: copy"),
    "classes that differ by case": (lambda r: images(r / "X", 8), "the classes 'X' and 'x' of .*mine differ in case"),
    "classes that differ by spelling": (
        lambda r: two(r, ("caf\u00e9", "cafe\u0301")), "the classes .* differ in case or spelling"),
    "a line end in a class": (lambda r: images(r / "a\nb", 8), r"got 'a\\nb/0.*control characters"),
    "parts by names that are not known": (
        _parts("training_set", "test_set"), "test_set and .*training_set hold folders of the same names.*train, val and"),
    "parts twice over": (_parts("seg_train/seg_train", "seg_test/seg_test"), "seg_test and .*seg_train hold folders of the"),
    "train and dev": (_parts("train", "dev"), "train and .*dev hold folders of the same names"),
    "a part twice": (_parts("train", "val", "valid"), "/val and .*/valid are both images to validate on"),
    "test images without labels": (_unlabelled, r"mine/test holds no images .* sort its images as those in .*mine/train"),
    "a format that is not read": (lambda r: images(r / "z", 4, ".jxl", "PNG"), r"000\.jxl is of a format that is not read"),
    "bytes that are no text": (_bytes_that_are_no_text, r"got 'x/\\udcff.png'.*control characters"),
    "an empty image": (lambda r: (r / "x/000.png").write_bytes(b""), "image .*x/000.png cannot be decoded"),
    "a text as an image": (lambda r: (r / "x/000.png").write_text("hello"), "x/000.png cannot be decoded .it is no JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_would_be_misread_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, sentence = BROKEN[case]
    make(two(tmp_path / "mine"))
    with pytest.raises(InputError, match=sentence) as raised:
        data = VTAB1K(tmp_path, "mine", image_size=8, batch_size=4, cache_dir=tmp_path / "cache", progress=False)
        data.setup("fit")
        data.setup("test")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("cache/mine-test*.npy"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp"])
def test_a_huge_image_is_one_sentence_without_pillows_warning(suffix: str, tmp_path: Path) -> None:
    folder = two(tmp_path / "mine")
    for name in ("x", "y"):
        for file in (folder / name).iterdir():
            file.unlink()
        for index in range(3):
            Image.new("1", (9500, 9500)).save(folder / name / f"{index}.{suffix}")
    data = VTAB1K(tmp_path, "mine", image_size=8, batch_size=4, cache_dir=tmp_path / "cache", progress=False)
    with (
        warnings.catch_warnings(),
        pytest.raises(InputError, match=r"9500 x 9500 pixels are more than the 50000000 .*: make it smaller, or leave"),
    ):
        warnings.simplefilter("error")
        data.setup("fit")
    assert not list(tmp_path.glob("cache/*.npy"))


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scan = two(tmp_path / "mine"), os.scandir

    def locked(path: Any) -> Any:
        if Path(path) == folder / "y":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)  # as root, who runs the tests in containers, everything can be read
    with pytest.raises(InputError, match=r"the folder .*y cannot be read \(Permission denied\): make it readable"):
        find_task(tmp_path, "mine")


def test_hidden_and_other_files_and_links_into_a_class_change_nothing(tmp_path: Path) -> None:
    folder = two(tmp_path / "mine")
    before = read_own_task(folder)
    (folder / "x/notes.txt").write_text("not an image")
    (folder / "README.md").write_text("nor this")
    images(folder / "x/.thumbnails", 3)
    (folder / "x/up").symlink_to(folder)
    assert read_own_task(folder) == before


def test_folders_without_images_are_said_and_figures_of_runs_are_none(tmp_path: Path) -> None:
    folder = two(tmp_path / "mine")
    images(folder / "z", 4, ".JFIF", "JPEG")
    for file in folder.glob("*/*"):
        file.write_bytes(file.read_bytes() + f"{file}".encode())  # behind the image: no two files are alike
    assert (open_folder(folder).class_names, open_folder(folder).warnings) == (("x", "y", "z"), ())
    RunFolder(folder / "runs/finetune/first", Settings(data=str(folder))).start()
    images(folder / "runs/finetune/first/plots", 5)
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("no image")
    found = open_folder(folder)
    assert found.class_names == ("x", "y", "z")
    sentence = "holds no image that is read"
    assert found.warnings == (f"{folder / 'notes'} {sentence}", f"{folder / 'runs'} {sentence}")
    assert set(found.warnings) < set(open_task(tmp_path, "mine").warnings)


def test_copies_of_training_images_among_those_to_test_are_said(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("x", "y"):
            images(tmp_path / part / name, 6)
            for file in (tmp_path / part / name).iterdir():
                file.write_bytes(file.read_bytes() + f"{file}".encode())  # behind the image: no two files are alike
    assert open_folder(tmp_path).warnings == ()
    shutil.copy(tmp_path / "train/x/003.png", tmp_path / "test/x/new.png")
    sentence = f"1 of the 13 images to test are copies of images to train on, such as {tmp_path}/test/x/new.png of"
    assert [each.startswith(sentence) for each in open_folder(tmp_path, hold_out=False).warnings] == [True]


def test_folders_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(folder: Path) -> list[Path]:
        read.append(folder)
        return image_files(folder)

    monkeypatch.setattr(own_tasks, "image_files", counted)
    assert ImageFolderDataModule(two(tmp_path)).class_names == ("x", "y")
    assert read == [tmp_path / "x", tmp_path / "y"]


def test_training_folders_alone_and_classes_without_test_images_are_said(tmp_path: Path) -> None:
    two(tmp_path / "alone" / "train")
    with pytest.raises(InputError, match="alone has the folder train alone: beside train/CLASS there must be"):
        find_task(tmp_path, "alone")
    folder = two(tmp_path / "mine")
    for split in ("train800", "val200", "train800val200"):
        (folder / f"{split}.txt").write_text("x/000.png 0\ny/000.png 1\n")
    with pytest.raises(MissingInputError, match=r"test\.txt is missing: write it anew .* none of VTAB-1K's tasks"):
        open_task(tmp_path, "mine")
    (folder / "test.txt").write_text("x/001.png 0\n")
    sentence = "mine/test.txt has no example of 1 of the 2 classes (1): nothing is said of them"
    assert sentence in open_task(tmp_path, "mine").warnings
    (folder / "test.txt").write_text("x/001.png 0\ny/none.png 1\n")
    with pytest.raises(MissingInputError, match=r"none\.png, listed in test\.txt, is missing .*: write it anew or bring"):
        open_task(tmp_path, "mine")
