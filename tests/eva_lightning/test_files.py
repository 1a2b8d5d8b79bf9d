"""Writing all or nothing, digests, room, and sizes in words."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eva_lightning.errors import InputError
from eva_lightning.files import (
    digest,
    file_digest,
    format_bytes,
    free_bytes,
    is_disk_full,
    replacing,
    writable_folder,
    write_json,
    write_text,
)
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
