from __future__ import annotations

from pathlib import Path

import pytest

from eva_lightning.errors import InputError
from eva_lightning.vision.data.split_files import read_split
from eva_lightning.vision.data.splits import open_task
from eva_lightning.vision.data.tasks import TASKS
from tests.eva_lightning.vision.fakes import make_task, write_lines


def test_reads_both_protocols(tmp_path: Path) -> None:
    make_task(tmp_path)
    final = open_task(tmp_path, "kitti")
    assert (final.train.name, len(final.train), final.evaluation.name, len(final.evaluation)) == (
        "train800val200", 24, "test", 12,
    )  # fmt: skip
    tuning = open_task(tmp_path, "kitti", "train800")
    assert (tuning.train.name, len(tuning.train), tuning.evaluation.name, len(tuning.evaluation)) == (
        "train800", 16, "val200", 8,
    )  # fmt: skip
    assert tuning.train.paths[1] == "images/train800_001.jpg"
    assert tuning.train.labels == tuple(i % 4 for i in range(16))


def test_wrong_counts_warn_once_per_file_and_official_counts_do_not(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    found = open_task(tmp_path, "kitti")
    assert not found.comparable
    assert [w for w in found.warnings if "test.txt lists 12 images where VTAB-1K has 711" in w]
    assert len(found.warnings) == 2
    assert all("not comparable" in warning for warning in found.warnings)
    for split, kind, count in (("train800val200", "train800", 1000), ("test", "test", 711)):
        write_lines(folder, split, [f"images/{kind}_{i % 12:03d}.jpg {i % 4}" for i in range(count)])
    official = open_task(tmp_path, "kitti")
    assert official.comparable
    assert official.warnings == ()


def test_limits_take_the_first_images_and_are_noted(tmp_path: Path) -> None:
    make_task(tmp_path)
    limited = open_task(tmp_path, "kitti", limit_train=5, limit_test=3)
    assert limited.train.labels == (0, 1, 2, 3, 0)
    assert len(limited.evaluation) == 3
    assert limited.limited
    assert not open_task(tmp_path, "kitti", limit_train=1000).limited
    with pytest.raises(ValueError, match="limit_train must be a whole number of at least 1, got 0"):
        open_task(tmp_path, "kitti", limit_train=0)


def test_missing_root_and_task_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: unpack the archive vtab-1k\.zip"):
        open_task(tmp_path / "nowhere", "kitti")
    make_task(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no folder dmlab \(it holds: kitti\): take it from"):
        open_task(tmp_path, "dmlab")
    with pytest.raises(FileNotFoundError, match="is itself a task folder: pass its parent folder"):
        open_task(tmp_path / "kitti", "kitti")
    make_task(tmp_path / "data" / "vtab-1k")
    with pytest.raises(FileNotFoundError, match=r"data has no folder kitti, but .*vtab-1k does: pass that as root"):
        open_task(tmp_path / "data", "kitti")


def test_missing_split_file_says_how_to_get_it(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "train800val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train800val200\.txt is missing: join train800\.txt and val200\.txt"):
        open_task(tmp_path, "kitti")
    (folder / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val200\.txt is missing: take it from the archive"):
        open_task(tmp_path, "kitti", "train800")


def test_missing_image_names_the_first_and_counts(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "images/test_003.jpg").unlink()
    (folder / "images/test_007.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_003\.jpg, listed in test\.txt, is missing \(2 of its 12 images"):
        open_task(tmp_path, "kitti")


@pytest.mark.parametrize("way", ["listed twice", "symbolic link", "hard link"])
def test_an_image_to_train_and_to_test_on_is_refused(tmp_path: Path, way: str) -> None:
    folder = make_task(tmp_path)
    trained, name = "images/train800_000.jpg", f"images/{way}.jpg"
    if way == "symbolic link":
        (folder / name).symlink_to(folder / trained)
    elif way == "hard link":
        (folder / name).hardlink_to(folder / trained)
    else:
        name = trained
    lines = (folder / "test.txt").read_text(encoding="utf-8").splitlines()
    write_lines(folder, "test", [*lines, f"{name} 0"])
    with pytest.raises(InputError, match=r"is also trained on: 1 of its 13 images are in train800val200 too"):
        open_task(tmp_path, "kitti")


@pytest.mark.parametrize("line", ["images/a.jpg", "images/a.jpg x", "7", "images/a.jpg 1.5"])
def test_bad_line_is_quoted_with_its_number(tmp_path: Path, line: str) -> None:
    folder = make_task(tmp_path)
    write_lines(folder, "test", ["images/test_000.jpg 0", "", line])
    with pytest.raises(ValueError, match=r"test\.txt line 3: expected 'relative_path int_label', got") as error:
        open_task(tmp_path, "kitti")
    assert repr(line) in str(error.value)


@pytest.mark.parametrize("label", [-1, 4])
def test_label_outside_the_range(tmp_path: Path, label: int) -> None:
    folder = make_task(tmp_path)
    write_lines(folder, "test", [f"images/test_000.jpg {label}"])
    with pytest.raises(ValueError, match=rf"line 1: label must be in 0\.\.3 for kitti, got {label}"):
        open_task(tmp_path, "kitti")


def test_label_gap_everywhere_is_an_error_and_in_training_alone_a_warning(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    keep = [line for line in (folder / "train800val200.txt").read_text().splitlines() if not line.endswith("3")]
    write_lines(folder, "train800val200", keep)
    warnings = open_task(tmp_path, "kitti").warnings
    assert any("train800val200.txt has no example of 1 of the 4 classes (3)" in warning for warning in warnings)
    for split in ("train800", "val200", "test"):
        lines = (folder / f"{split}.txt").read_text().splitlines()
        write_lines(folder, split, [line for line in lines if not line.endswith("3")])
    with pytest.raises(ValueError, match=r"label gap in .*: 1 of the 4 classes \(3\) occur in no split file"):
        open_task(tmp_path, "kitti")


def test_empty_and_binary_split_files(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "test.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"test\.txt lists no image"):
        open_task(tmp_path, "kitti")
    (folder / "test.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"test\.txt is not a text file"):
        open_task(tmp_path, "kitti")


def test_paths_with_spaces_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "kitti").mkdir()
    (tmp_path / "kitti/test.txt").write_bytes("\ufeffimages/a b.jpg 1\r\nimages/c.jpg\t2\r\n".encode())
    split = read_split(tmp_path / "kitti", "test", TASKS["kitti"].classes)
    assert split.paths == ("images/a b.jpg", "images/c.jpg")
    assert split.labels == (1, 2)


def test_unknown_split_suggests(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown split 'train80': did you mean train800"):
        open_task(tmp_path, "kitti", "train80")


def test_evaluation_split_can_be_chosen_but_not_what_is_trained_on(tmp_path: Path) -> None:
    make_task(tmp_path)
    found = open_task(tmp_path, "kitti", "train800", evaluation="test")
    assert (found.train.name, found.evaluation.name) == ("train800", "test")
    with pytest.raises(ValueError, match="evaluation on val200 needs split='train800'"):
        open_task(tmp_path, "kitti", evaluation="val200")
    with pytest.raises(ValueError, match="unknown evaluation 'tset': did you mean test"):
        open_task(tmp_path, "kitti", evaluation="tset")


@pytest.mark.parametrize("label", ["1_0", "\u0661", "1.0", "9" * 5000, "0x1"])
def test_labels_are_plain_digits(tmp_path: Path, label: str) -> None:
    (tmp_path / "train800.txt").write_text(f"a.jpg {label}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"train800\.txt line 1: expected 'relative_path int_label'"):
        read_split(tmp_path, "train800", 20)


def test_a_list_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "train800.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"train800\.txt is larger than"):
        read_split(tmp_path, "train800", 20)
