from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from eva_lightning.vision.data.tasks import TASKS
from experiments.vtab.__main__ import main as vtab
from tests.eva_lightning.vision.fakes import make_task
from tests.paths import ROOT
from tests.tools.vtab import original_fakes
from tools.vtab import originals
from tools.vtab.prepare import command_line, main


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """vtab-1k.zip with two tasks."""
    make_task(tmp_path / "source" / "vtab-1k", "kitti")
    make_task(tmp_path / "source" / "vtab-1k", "dmlab", classes=6)
    file = tmp_path / "vtab-1k.zip"
    with zipfile.ZipFile(file, "w") as opened:
        for path in sorted((tmp_path / "source").rglob("*")):
            if path.is_file():
                opened.write(path, path.relative_to(tmp_path / "source"))
    return file


def words(root: Path, *more: object) -> list[str]:
    return ["--root", str(root), *map(str, more)]


def test_archive_to_a_table_and_json(tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words(tmp_path / "root", "--task", "kitti,dmlab", "--archive", archive, "--json", tmp_path / "s.json")
    assert vtab(["prepare", *arguments]) == 0
    output = capsys.readouterr().out
    for row in ("kitti", "dmlab", "16 of 800", "12 of 22735", "usable", "2 of 2 tasks can be used"):
        assert row in output
    found = json.loads((tmp_path / "s.json").read_text())
    assert [row["task"] for row in found] == ["dmlab", "kitti"]  # in the order of the benchmark
    assert found[0]["official_counts"]["test"] == 22735
    assert {path.name for path in (tmp_path / "root").iterdir() if not path.name.startswith(".")} == {"kitti", "dmlab"}


def test_without_task_all_nineteen_are_asked_for(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(words(tmp_path / "root", "--archive", archive)) == 1
    output = capsys.readouterr().out
    assert all(f" {task} " in output for task in TASKS)
    assert output.count("│ missing │") == 17
    assert "2 of 19 tasks can be used: dmlab, kitti" in output
    assert "or from --archive FILE, by: python -m experiments.vtab prepare --root" in output


def test_existing_folder_is_checked_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_task(tmp_path)
    assert command_line(words(tmp_path, "--task", "kitti")) == 0
    assert command_line(words(tmp_path, "--check")) == 1
    captured = capsys.readouterr()
    assert "1 of 19 tasks can be used: kitti" in captured.out
    assert captured.err == ""


def test_joint_split_is_made(tmp_path: Path) -> None:
    folder = make_task(tmp_path)
    before = (folder / "train800val200.txt").read_text()
    (folder / "train800val200.txt").unlink()
    (found,) = main(words(tmp_path, "--task", "kitti"))
    assert found.usable
    assert (folder / "train800val200.txt").read_text() == before


def test_archive_mends_what_is_missing_and_broken(tmp_path: Path, archive: Path) -> None:
    root = tmp_path / "root"
    main(words(root, "--task", "kitti", "--archive", archive))
    folder = root / "kitti"
    (folder / "images/test_000.jpg").unlink()
    broken = folder / "images/test_001.jpg"
    broken.write_bytes(b"x" * broken.stat().st_size)  # the archive's size
    (folder / "val200.txt").write_text("images/val200_000.jpg 99\n")
    (before,) = main(words(root, "--task", "kitti", "--check"))
    assert before.verdict == "incomplete"
    (after,) = main(words(root, "--task", "kitti", "--archive", archive))
    assert after.usable
    source = tmp_path / "source" / "vtab-1k" / "kitti"
    for name in ("images/test_000.jpg", "images/test_001.jpg", "val200.txt"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_broken_images_fail_with_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_task(tmp_path)
    (folder / "images/test_004.jpg").write_bytes(b"<html>")
    assert command_line(words(tmp_path, "--check", "--task", "kitti")) == 1
    output = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "35 of 36 incomplete" in output
    assert "1 images cannot be decoded" in output


def test_offline_is_said_quickly_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_task(tmp_path)
    assert command_line(words(tmp_path)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(
        f"error: 18 of 19 tasks are not whole in {tmp_path} (caltech101, cifar, dtd, …; --task kitti"
    )
    assert "does not answer" in captured.err
    assert captured.err.endswith("and pass it as --archive FILE\n")


def test_from_originals_builds_what_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = original_fakes.kitti(tmp_path / "originals")
    sizes = {split: len(found) for split, found in examples.items()}
    monkeypatch.setitem(originals.ORIGINALS, "kitti", replace(originals.ORIGINALS["kitti"], sizes=sizes))
    assert command_line(words(tmp_path / "root", "--from-originals", tmp_path / "originals")) == 1
    assert "1 of 19 tasks can be used: kitti" in capsys.readouterr().out
    assert (tmp_path / "root" / "kitti" / "images" / "test" / "000000.png").is_file()
    assert command_line(words(tmp_path / "root", "--from-originals", tmp_path / "originals", "--task", "kitti")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "kiti"], "unknown VTAB-1K task 'kiti': did you mean kitti?"),
        (["--task", ","], "--task must name at least one task"),
        (
            ["--archive", "none.zip"],
            "archive none.zip does not exist: pass vtab-1k.zip, zips of tasks, or their folder",
        ),
        (["--archive", "a.zip", "--check"], "choose one of --archive and --check"),
        (["--from-originals", "none"], "folder none of original data does not exist"),
        (["--workers", "0"], "--workers must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert command_line(words(tmp_path, *more)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_caltech101_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(words(tmp_path / "root", "--task", "caltech101", "--from-originals", tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: caltech101 cannot be built from its original data: TFDS drew")
    assert command_line(words(tmp_path / "root", "--from-originals", tmp_path)) == 2
    assert "holds no original data of a missing task; looked for CLEVR_v1.0, " in capsys.readouterr().err


def test_wrong_roots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_task(tmp_path / "data" / "vtab-1k")
    (tmp_path / "file").write_text("")
    for root, message in (
        (tmp_path / "data" / "vtab-1k" / "kitti", "is itself a task folder: pass its parent folder"),
        (tmp_path / "data", f"holds no task folder, but {tmp_path / 'data' / 'vtab-1k'} does: pass that as --root"),
        (tmp_path / "file", "root must be a folder, and"),
    ):
        assert command_line(words(root)) == 2
        assert message in capsys.readouterr().err
    assert command_line(words(tmp_path / "nowhere", "--check")) == 2
    assert "nowhere does not exist: there is nothing to check" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_archive_of_other_tasks(tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(words(tmp_path / "root", "--task", "svhn", "--archive", archive)) == 2
    error = capsys.readouterr().err
    assert "holds none of the tasks that are missing" in error
    assert "(svhn); tasks in it: dmlab, kitti" in error


def test_too_little_room(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    assert command_line(words(tmp_path / "root", "--task", "kitti", "--archive", archive)) == 2
    assert "error: unpacking needs " in capsys.readouterr().err


def test_disk_that_fills_up_while_unpacking(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(member: object, source: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = words(tmp_path / "root", "--task", "kitti", "--archive", archive)
    monkeypatch.setattr("tools.vtab.archive._block", full)
    assert command_line(arguments) == 2
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    assert command_line(arguments) == 0


def test_second_prepare_of_the_same_folder_is_refused(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    (tmp_path / "root").mkdir()
    with FileLock(tmp_path / "root" / ".prepare.lock"):
        assert command_line(words(tmp_path / "root", "--archive", archive)) == 2
    assert "another prepare is at work in" in capsys.readouterr().err
    assert command_line(words(tmp_path / "root", "--archive", archive, "--task", "kitti")) == 0


def test_mistakes_are_reported_before_timm_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from tools.vtab.prepare import command_line; "
        f"status = command_line(['--root', {str(tmp_path)!r}, '--task', 'kiti']); "
        "assert 'timm' not in sys.modules and 'torchvision' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
