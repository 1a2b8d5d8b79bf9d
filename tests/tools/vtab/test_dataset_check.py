from __future__ import annotations

import json
from pathlib import Path

import pytest

from eva_lightning.vision.data.split_files import read_split, whence
from eva_lightning.vision.data.tasks import TASKS
from tests.eva_lightning.vision.fakes import make_task, write_lines
from tools.vtab import dataset_check as status
from tools.vtab.dataset_check import check_tasks, join_training_splits


def make_official(root: Path) -> Path:
    """KITTI with the official counts, all lines on a few images."""
    folder = make_task(root)
    lines = [f"images/test_{index % 12:03d}.jpg {index % 4}" for index in range(1000)]
    for name, count in (("train800", 800), ("val200", 200), ("train800val200", 1000), ("test", 711)):
        write_lines(folder, name, lines[:count])
    return folder


def test_official_counts_and_whole_images_are_ok(tmp_path: Path) -> None:
    make_official(tmp_path)
    (found,) = check_tasks(tmp_path, ["kitti"], workers=2)
    assert (found.verdict, found.usable, found.problems, found.notes) == ("ok", True, (), ())
    assert found.counts == {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}
    assert (found.classes, found.images, found.missing) == (4, 12, 0)
    assert json.loads(json.dumps(found.as_json()))["official_counts"] == found.counts


def test_nineteen_rows_in_order_where_there_is_nothing(tmp_path: Path) -> None:
    found = check_tasks(tmp_path / "nowhere")
    assert [row.task.name for row in found] == list(TASKS)
    assert {row.verdict for row in found} == {"missing"}
    assert not (tmp_path / "nowhere").exists()


def test_other_counts_are_usable_but_said(tmp_path: Path) -> None:
    make_task(tmp_path)
    (found,) = check_tasks(tmp_path, ["kitti"])
    assert (found.verdict, found.usable) == ("usable", True)
    assert any("test.txt lists 12 images where VTAB-1K has 711: results are not comparable" in n for n in found.notes)


def test_joint_split_with_other_labels_is_noted(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    lines = (folder / "train800val200.txt").read_text().splitlines()
    write_lines(folder, "train800val200", lines[:-1])
    (found,) = check_tasks(tmp_path, ["kitti"])
    assert "train800val200.txt has other labels than train800.txt and val200.txt together" in found.notes


def test_missing_broken_and_truncated_images(tmp_path: Path) -> None:
    folder = make_task(tmp_path, size=200)
    (folder / "images/test_003.jpg").unlink()
    (folder / "images/test_004.jpg").write_bytes(b"<html>")
    whole = (folder / "images/test_005.jpg").read_bytes()
    (folder / "images/test_005.jpg").write_bytes(whole[: len(whole) // 2])
    (found,) = check_tasks(tmp_path, ["kitti"], workers=2)
    assert (found.verdict, found.missing) == ("incomplete", 1)
    assert found.broken == ("images/test_004.jpg",)
    assert found.truncated == ("images/test_005.jpg",)
    assert found.damaged == ("images/test_004.jpg",)
    assert "1 of 36 listed images are missing, such as images/test_003.jpg" in found.problems
    assert "1 images cannot be decoded, such as images/test_004.jpg" in found.problems
    assert any("1 JPEGs end early, such as images/test_005.jpg" in note for note in found.notes)


def test_missing_and_bad_split_files(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "val200.txt").unlink()
    write_lines(folder, "test", ["images/test_000.jpg 9"])
    (folder / "train800.txt").write_text("\n")
    (found,) = check_tasks(tmp_path, ["kitti"])
    assert found.verdict == "incomplete"
    assert found.problems == (
        f"train800.txt lists no image: {whence(folder)}",
        "val200.txt is missing",
        "test.txt line 1: label must be in 0..3 for kitti, got 9",
    )
    assert found.damaged == ("train800.txt", "test.txt")
    assert found.counts == {"train800": None, "val200": None, "train800val200": 24, "test": None}


def test_lost_class(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    for name in ("train800", "val200", "train800val200", "test"):
        lines = (folder / f"{name}.txt").read_text().splitlines()
        write_lines(folder, name, [line for line in lines if not line.endswith("3")])
    (found,) = check_tasks(tmp_path, ["kitti"])
    assert found.problems == ("only 3 of the 4 classes occur in the split files",)


def test_second_check_decodes_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def damage(path: Path) -> None:
        decoded.append(path.name)

    monkeypatch.setattr(status, "image_damage", damage)
    make_task(tmp_path)
    make_task(tmp_path, "dmlab", classes=6)
    first = check_tasks(tmp_path, ["kitti", "dmlab"])
    assert len(decoded) == 72
    assert check_tasks(tmp_path, ["kitti", "dmlab"]) == first
    assert len(decoded) == 72
    (tmp_path / "kitti/images/test_000.jpg").write_bytes(b"other")
    check_tasks(tmp_path, ["kitti", "dmlab"])
    assert len(decoded) == 72 + 36


def test_damage_is_remembered_too(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    (folder / "images/test_004.jpg").write_bytes(b"<html>")
    first = check_tasks(tmp_path, ["kitti"])
    assert first[0].broken
    assert check_tasks(tmp_path, ["kitti"]) == first


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "tasks": {"kitti": 3}}', '{"format": 99}'])
def test_memory_of_another_kind_is_passed_over(tmp_path: Path, content: str) -> None:
    make_task(tmp_path)
    (tmp_path / ".vtab1k-check.json").write_text(content)
    assert check_tasks(tmp_path, ["kitti"])[0].images == 36


def test_folder_that_cannot_be_written_is_checked_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied")

    make_task(tmp_path)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert check_tasks(tmp_path, ["kitti"])[0].usable


def test_progress_counts_images_of_each_task(tmp_path: Path) -> None:
    make_task(tmp_path)
    steps: list[tuple[str, int, int]] = []
    check_tasks(tmp_path, ["kitti"], advance=lambda *step: steps.append(step))
    assert steps == [("kitti", index, 36) for index in range(1, 37)]


def test_joint_split_is_written_where_it_alone_is_missing(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    before = read_split(folder, "train800val200", 4)
    assert not join_training_splits(tmp_path, "kitti")
    (folder / "train800val200.txt").unlink()
    assert join_training_splits(tmp_path, "kitti")
    assert read_split(folder, "train800val200", 4) == before
    (folder / "train800val200.txt").unlink()
    (folder / "val200.txt").unlink()
    assert not join_training_splits(tmp_path, "kitti")


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown VTAB-1K task 'kiti': did you mean kitti"):
        check_tasks(tmp_path, ["kiti"])
