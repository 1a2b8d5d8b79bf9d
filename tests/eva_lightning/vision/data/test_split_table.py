"""Split files with classes by name, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.data.own_tasks import Drawing, find_task, read_own_task
from eva_lightning.vision.data.split_table import read_split_file
from eva_lightning.vision.data.splits import open_folder, open_task
from tests.eva_lightning.vision.data.test_own_tasks import images
from tests.eva_lightning.vision.fakes import make_task

ROWS = [
    ("x/000.png", "owl", "train"), ("x/001.png", "owl", "train"), ("x/002.png", "owl", "test"),
    ("y/000.png", "cat", "training"), ("y/001.png", "cat", "val"), ("y/002.png", "cat", "Test"),
    ("x/003.png", "owl", "valid"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("x", "y"):
        images(tmp_path / "mine" / name, 8)
    return tmp_path / "mine"


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
def test_a_table_of_pandas_divides_the_images(folder: Path, separator: str) -> None:
    frame = pd.DataFrame(ROWS, columns=["filename", "Label", "split"])
    frame.to_csv(folder / "splits.csv", sep=separator, index=False)
    own = read_own_task(folder)
    assert own.classes == ("cat", "owl")
    found = {name: set(part) for name, part in own.splits.items()}
    assert found["train800"] == {("x/000.png", 1), ("x/001.png", 1), ("y/000.png", 0)}
    assert found["val200"] == {("y/001.png", 0), ("x/003.png", 1)}
    assert found["test"] == {("x/002.png", 1), ("y/002.png", 0)}
    assert open_folder(folder).evaluation.listed_in == str(folder / "splits.csv")
    # the VTAB command reads such a folder by the same code
    assert open_task(folder.parent, "mine").train.paths == open_folder(folder, hold_out=False).train.paths


def test_a_table_without_splits_is_drawn_as_class_folders_are(folder: Path, tmp_path: Path) -> None:
    by_folders = read_own_task(folder)
    table = tmp_path / "labels.csv"
    lines = [f'"{name}/{index:03d}.png",{name}' for index in range(8) for name in ("y", "x")]
    table.write_text("\ufeffpath,label\n" + "\n".join(lines) + "\n", encoding="utf-8")
    by_table = read_own_task(folder, Drawing(split_file=table))
    assert (by_table.classes, by_table.splits) == (by_folders.classes, by_folders.splits)


def test_lists_of_train_and_test_are_read_and_numbers_sorted_as_numbers(folder: Path) -> None:
    (folder / "train.txt").write_text("x/000.png 10\nx/001.png 10\ny/000.png 9\ny/001.png 9\n")
    (folder / "test.txt").write_text("x/002.png 10\ny/002.png 9\n")
    own = read_own_task(folder)
    assert own.classes == ("9", "10")
    assert {name: len(part) for name, part in own.splits.items()} == {
        "train800": 2, "val200": 2, "train800val200": 4, "test": 2,
    }  # fmt: skip
    assert find_task(folder.parent, "mine").classes == 2


def test_a_table_that_is_asked_for_comes_before_the_files_of_vtab(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "mine", classes=3)
    table = tmp_path / "mine.csv"
    rows = [
        (f"images/train800_{index:03d}.jpg", "ab"[index % 2], "train" if index < 8 else "test") for index in range(12)
    ]
    pd.DataFrame(rows, columns=["path", "label", "split"]).to_csv(table, index=False)
    assert open_folder(folder).task.classes == 3
    found = open_folder(folder, Drawing(split_file=table))
    assert (found.task.classes, found.class_names) == (2, ("a", "b"))


BROKEN = {
    "no column": ("name,label\na.png,x\n", "has no column path, got 'name, label'"),
    "no label": ("path,label\nx/000.png,\n", "line 2: path and label are needed"),
    "unknown split": ("path,label,split\nx/000.png,a,tests\n", "line 2: unknown split 'tests': did you mean test"),
    "twice": ("path,label\nx/000.png,a\n./x/000.png,b\n", "line 3: 'x/000.png' is listed in .* line 2 already"),
    "outside": ("path,label\n../x.png,a\n", "line 2: the path must be a relative path inside its folder"),
    "absolute": ("path,label\n/x/000.png,a\n", "got '/x/000.png': it is absolute"),
    "from Windows": ("path,label\nx\\000.png,a\n", "it has a backslash, and / is what stands between the names"),
    "some without split": ("path,label,split\nx/000.png,a,train\nx/001.png,a,\n", "some images have no split"),
    "a label that is no word": ("path,label\nx/000.png,a\x1bb\n", "the label must be a word that can be printed"),
    "nothing": ("path,label\n", "lists no image"),
    "empty": ("", "has no column path"),
    "a quote that does not end": ('path,label\n"x/000.png,a\n', "is damaged"),
    "one part": ("path,label,split\nx/000.png,a,train\ny/000.png,b,train\n", "images of the split train alone"),
    "one class": ("path,label\nx/000.png,a\nx/001.png,a\nx/002.png,a\n", "has one class, 'a'"),
    "classes alike": ("path,label\nx/000.png,a\nx/001.png,A\n", "differ in case or spelling only"),
    "too few": ("path,label\nx/000.png,a\nx/001.png,b\n", "class a of .* has 1 image, and 3 are needed"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_a_table_is_one_sentence(folder: Path, case: str) -> None:
    text, sentence = BROKEN[case]
    (folder / "splits.csv").write_text(text)
    with pytest.raises(InputError, match=sentence) as raised:
        read_own_task(folder)
    assert "\n" not in str(raised.value)


def test_missing_files_and_images_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"split file .*no\.csv does not exist"):
        read_own_task(folder, Drawing(split_file=tmp_path / "no.csv"))
    with pytest.raises(MissingInputError, match=r"split file .*train\.txt does not exist"):
        read_own_task(folder, Drawing(split_file=tmp_path / "train.txt"))
    (tmp_path / "bytes.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(InputError, match="is not a text in UTF-8"):
        read_split_file(tmp_path / "bytes.csv")
    with pytest.raises(InputError, match="must be a table"):
        read_split_file(tmp_path / "labels.txt")
    frame = pd.DataFrame([*ROWS, ("x/none.png", "owl", "train")], columns=["path", "label", "split"])
    frame.to_csv(folder / "splits.csv", index=False)
    with pytest.raises(MissingInputError, match=r"none\.png, listed in .*splits\.csv, is missing \(1 of its 4 images"):
        open_folder(folder)
