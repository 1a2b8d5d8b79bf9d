"""Writing all or nothing, digests, room, and sizes in words."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
import torch

from eva_lightning import files, plots
from eva_lightning.errors import DiskFullError, InputError, UnwritableError
from eva_lightning.files import (
    check_writable,
    digest,
    file_digest,
    filling,
    format_bytes,
    free_bytes,
    is_disk_full,
    is_temporary,
    replacing,
    writable_folder,
    write_json,
    write_text,
)
from eva_lightning.tensor_files import write_tensors
from tests.paths import ROOT


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write_text(file, "old")

    def fail() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "folder" / "ours.json"
    plain.write_text("")
    write_json(ours, {"a": 1})
    assert ours.stat().st_mode == plain.stat().st_mode
    ours.chmod(0o640)
    write_json(ours, {"a": 2})
    assert ours.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    code = (
        "import sys; from eva_lightning.files import write_text\n"
        "for i in range(10**6): write_text(sys.argv[1], str(i % 10) * 2_000_000)"
    )
    for delay in (0.05, 0.12, 0.31):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT)
        deadline = time.monotonic() + 30
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = file.read_text()
        assert len(content) == 2_000_000
        assert len(set(content)) == 1


def test_the_name_is_on_the_disk_before_the_writer_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the content, then the name, then the folder that holds the name, and those made for it."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        found = Path(f"/proc/self/fd/{handle}").readlink()
        events.append("content" if is_temporary(found) else f"folder {found.name}")
        fsync(handle)

    def noted_rename(self: Path, target: Path) -> Path:
        events.append("name")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    write_text(tmp_path / "a" / "b" / "file", "x")
    assert events == [f"folder {tmp_path.name}", "folder a", "content", "name", "folder b"]


def test_a_folder_is_filled_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("old")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FileExistsError), filling(tmp_path, "config") as temporary:  # noqa: PT012
        (temporary / "config").write_text("new")
        (temporary / "config").mkdir()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config": "old", "mine": "mine"}
    with filling(tmp_path, "config") as temporary:
        (temporary / "config").write_text("new")
        (temporary / "weights").write_text("new")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"config": "new", "weights": "new", "mine": "mine"}


def test_a_kill_between_the_names_leaves_no_old_file_beside_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors"]
    replace = Path.replace

    def killed_before(last: str, path: Path, target: Path) -> Path:
        if target.name == last:
            raise RuntimeError("killed")
        return replace(path, target)

    for killed in names:
        for name in names:
            write_text(tmp_path / name, "old")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda path, target, killed=killed: killed_before(killed, path, target))
            with pytest.raises(RuntimeError, match="killed"), filling(tmp_path, names[0]) as temporary:  # noqa: PT012
                for name in names:
                    (temporary / name).write_text("new")
        assert not (tmp_path / names[0]).exists(), killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_what_killed_writers_leave_goes_and_what_living_ones_write_stays(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        with replacing(tmp_path / "killed"), filling(tmp_path, "config") as folder:
            (folder / "killed").write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert sum(map(is_temporary, tmp_path.iterdir())) == 2
    with replacing(tmp_path / "living") as temporary:
        temporary.write_text("living")
        files._tidied.clear()
        write_text(tmp_path / "other", "other")
        assert [path for path in tmp_path.iterdir() if is_temporary(path)] == [temporary]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living", "other"]


def _savez(file: Path) -> None:
    np.savez(file, x=np.zeros(10**6))


def _figure(file: Path) -> None:
    plots.rank_heatmap({"blocks.0.q": 3}, 2).savefig(file, format="png")


def _frame(file: Path) -> None:
    pd.DataFrame({"x": range(10)}).to_csv(file)


FULL_WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda file: file.write_text("new"),
    "bytes": lambda file: file.write_bytes(bytes(10**6)),
    "tensors": lambda file: write_tensors(file, {"x": torch.zeros(10**5)}),
    "npz": _savez,
    "figure": _figure,
    "csv": _frame,
    "gif": lambda file: iio.imwrite(
        file, np.zeros((3, 64, 64, 3), np.uint8), extension=".gif", plugin="pillow", duration=50
    ),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio tries once more
@pytest.mark.parametrize("writer", FULL_WRITERS)
def test_a_full_disk_leaves_the_old_file_and_says_make_room(
    writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = {"npz": ".npz", "figure": ".png", "gif": ".gif"}.get(writer, ".x")
    file = tmp_path / f"file{suffix}"
    file.write_text("old")

    def on_full_disk(folder: Path, suffix: str) -> str:
        (folder / f"full{suffix}").symlink_to("/dev/full")
        return str(folder / f"full{suffix}")

    monkeypatch.setattr(files, "_new_file", on_full_disk)
    with (
        pytest.raises(DiskFullError, match=r"the disk that holds .* make room") as caught,
        replacing(file) as temporary,
    ):
        FULL_WRITERS[writer](temporary)
    assert is_disk_full(caught.value)
    assert isinstance(caught.value, OSError)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "file" / "below", "not a directory|file exists"),
        (tmp_path / "folder", "is a directory"),
        (tmp_path / ("x" * 300), "file name too long"),
    ):
        with pytest.raises(UnwritableError, match=rf"cannot write to {path}.*: ({reason})"):
            write_text(path, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    with pytest.raises(UnwritableError, match=r"cannot write to .*new: read-only file system"):
        check_writable(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*: not a directory"):
        writable_folder(blocked / "below")
    assert writable_folder(tmp_path / "a" / "b").is_dir()


def test_digests(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert len(digest(None)) == 16
    file = tmp_path / "file"
    file.write_bytes(os.urandom(3_000_000))
    assert file_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    content = file.read_bytes()
    assert file_digest(file, span=1000) == hashlib.sha256(content[:1000] + content[-1000:]).hexdigest()


def test_room_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.2)


def test_full_disks_are_recognised_through_other_errors() -> None:
    full = OSError(errno.ENOSPC, "full")
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = full
    assert is_disk_full(full)
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("write failed: No space left on device"))
    assert not is_disk_full(RuntimeError("other"))
    assert not is_disk_full(None)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (5e15, "4547.5 TiB")]
)
def test_sizes_in_words(size: float, text: str) -> None:
    assert format_bytes(size) == text
