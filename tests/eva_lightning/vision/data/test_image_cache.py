from __future__ import annotations

import errno
import io
import logging
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eva_lightning.files import is_temporary
from eva_lightning.vision.data import image_cache as cache
from eva_lightning.vision.data.image_cache import cached_images
from eva_lightning.vision.data.images import load_image
from eva_lightning.vision.data.split_files import Split, read_split
from tests.eva_lightning.vision.fakes import make_task
from tests.paths import ROOT



@pytest.fixture
def split(tmp_path: Path) -> Split:
    return read_split(make_task(tmp_path / "data"), "test", 4)


def no_decoding(path: object, size: int) -> None:
    raise AssertionError(f"decoded {path} again")


@pytest.mark.parametrize("workers", [0, 3])
def test_holds_what_decoding_gives_in_order(tmp_path: Path, split: Split, workers: int) -> None:
    images = cached_images(split, 16, tmp_path / "cache", workers=workers, progress=False)
    assert images is not None
    assert images.shape == (12, 3, 16, 16)
    for index, path in enumerate(split.paths):
        np.testing.assert_array_equal(images[index], load_image(split.folder / path, 16))


def test_second_time_decodes_nothing(tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_images(split, 16, tmp_path / "cache", progress=False)
    monkeypatch.setattr(cache, "load_image", no_decoding)
    second = cached_images(split, 16, tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(first, second)


def test_changed_image_and_other_size_do_not_meet_the_old_cache(tmp_path: Path, split: Split) -> None:
    before = cached_images(split, 16, tmp_path / "cache", progress=False)
    assert before is not None
    other = (split.folder / split.paths[1]).read_bytes()
    (split.folder / split.paths[0]).write_bytes(other)
    after = cached_images(split, 16, tmp_path / "cache", progress=False)
    assert after is not None
    np.testing.assert_array_equal(after[0], before[1])
    smaller = cached_images(split, 8, tmp_path / "cache", progress=False)
    assert smaller is not None
    assert smaller.shape == (12, 3, 8, 8)


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def zero_the_tail(file: Path) -> None:
    """What a crash leaves where a file system has allocated blocks that were never written."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 500)
        stream.truncate(size)


def cut_the_tail(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def swap_two_images(file: Path) -> None:
    data = bytearray(file.read_bytes())
    start, length = 128, 3 * 16 * 16
    first, second = data[start : start + length], data[start + length : start + 2 * length]
    data[start : start + 2 * length] = second + first
    file.write_bytes(data)


def empty_it(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_a_byte, zero_the_tail, cut_the_tail, swap_two_images, empty_it])
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_cache_is_made_again(
    tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], workers: int
) -> None:
    whole = np.array(cached_images(split, 16, tmp_path / "cache", progress=False))
    (file,) = (tmp_path / "cache").glob("*.npy")
    damage(file)
    with caplog.at_level(logging.WARNING):
        again = cached_images(split, 16, tmp_path / "cache", workers=workers, progress=False)
    assert f"image cache {file.name} is damaged: decoding the images again" in caplog.text
    assert caplog.text.count("damaged") == 1
    np.testing.assert_array_equal(again, whole)


def test_checksums_are_those_of_zlib_behind_the_pixels(tmp_path: Path, split: Split) -> None:
    images = cached_images(split, 16, tmp_path / "cache", progress=False)
    assert images is not None
    (file,) = (tmp_path / "cache").glob("*.npy")
    np.testing.assert_array_equal(np.load(file), images)  # still a file that NumPy reads
    stored = np.frombuffer(file.read_bytes()[-4 * 12 - 4 : -4], dtype="<u4")
    assert stored.tolist() == [zlib.crc32(image.tobytes()) for image in images]


def test_checksums_are_compared_once_per_process(tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_images(split, 16, tmp_path / "cache", progress=False)
    compared: list[Path] = []

    def intact(file: Path, *others: object) -> bool:
        compared.append(file)
        return True

    monkeypatch.setattr(cache, "_intact", intact)
    cached_images(split, 16, tmp_path / "cache", progress=False)
    assert compared == []
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.touch()
    cached_images(split, 16, tmp_path / "cache", progress=False)
    assert compared == [file]


BUILDER = """
import sys, time
from pathlib import Path
from eva_lightning.vision.data import image_cache as cache
from eva_lightning.vision.data.split_files import read_split
count = Path(sys.argv[3])
def counted(path, size, load=cache.load_image):
    with count.open("a") as stream:
        stream.write(".")
    time.sleep(0.02)
    return load(path, size)
cache.load_image = counted
print("ready", flush=True)
sys.stdin.readline()
images = cache.cached_images(read_split(Path(sys.argv[1]), "test", 4), 16, sys.argv[2], progress=False)
print(int(images.sum()), flush=True)
"""


def start_builders(tmp_path: Path, split: Split, number: int) -> list[subprocess.Popen[str]]:
    """Processes that want the same cache and wait for a line to begin."""
    words = [sys.executable, "-c", BUILDER, str(split.folder), str(tmp_path / "cache"), str(tmp_path / "count")]
    processes = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(number)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return processes


def test_many_processes_at_once_decode_once(tmp_path: Path, split: Split) -> None:
    processes = start_builders(tmp_path, split, 3)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    sums = {process.communicate(timeout=60)[0] for process in processes}
    images = cached_images(split, 16, tmp_path / "cache", progress=False)
    assert images is not None
    assert sums == {f"{int(images.sum())}\n"}
    assert len((tmp_path / "count").read_text()) == len(split)


def test_killed_builder_blocks_nobody_and_leaves_nothing(tmp_path: Path, split: Split) -> None:
    (process,) = start_builders(tmp_path, split, 1)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not (tmp_path / "count").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert any(map(is_temporary, (tmp_path / "cache").iterdir()))
    assert all(map(is_temporary, (tmp_path / "cache").glob("*.npy")))
    images = cached_images(split, 16, tmp_path / "cache", progress=False)
    assert images is not None
    np.testing.assert_array_equal(images[3], load_image(split.folder / split.paths[3], 16))
    assert not any(map(is_temporary, (tmp_path / "cache").iterdir()))


def left_behind(folder: Path) -> list[str]:
    """Files that a failed attempt has left, without the empty lock."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("workers", [0, 3])
def test_failure_leaves_nothing_behind(tmp_path: Path, split: Split, workers: int) -> None:
    (split.folder / split.paths[7]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"test_007\.jpg cannot be decoded"):
        cached_images(split, 16, tmp_path / "cache", workers=workers, progress=False)
    assert left_behind(tmp_path / "cache") == []


def test_too_little_room_goes_without(
    tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_ROOM_TO_LEAVE", 1 << 60)
    with caplog.at_level(logging.WARNING):
        assert cached_images(split, 16, tmp_path / "cache", progress=False) is None
    assert re.search(r"no image cache for kitti test: it needs .* and .* has .* free", caplog.text)


def test_disk_that_fills_up_meanwhile_goes_without(
    tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            if self.tell() > 5000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)  # type: ignore[arg-type]

    def open_file(path: Path, mode: str = "r", *options: Any, usual: Any = Path.open, **named: Any) -> Any:
        return FullDisk(path, mode) if is_temporary(path) else usual(path, mode, *options, **named)

    monkeypatch.setattr(Path, "open", open_file)
    with caplog.at_level(logging.WARNING):
        assert cached_images(split, 16, tmp_path / "cache", progress=False) is None
    assert caplog.text.count("\n") == 1
    assert re.search(r"no image cache for kitti test: .*cache cannot be written \(the disk is full\)", caplog.text)
    assert left_behind(tmp_path / "cache") == []


def test_missing_image_is_no_matter_of_the_disk(tmp_path: Path, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "fingerprint", lambda split, size: "0" * 16)
    (split.folder / split.paths[2]).unlink()
    with pytest.raises(FileNotFoundError, match=r"test_002\.jpg"):
        cached_images(split, 16, tmp_path / "cache", progress=False)


def test_cache_folder_that_cannot_be_made_goes_without(
    tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert cached_images(split, 16, tmp_path / "file" / "cache", progress=False) is None
    assert "no image cache for kitti test: " in caplog.text
