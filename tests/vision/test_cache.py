from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from eva_lightning.vision import cache
from eva_lightning.vision.cache import cached_images
from eva_lightning.vision.images import load_image
from eva_lightning.vision.splits import Split, read_split
from tests.vision.fakes import make_task


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


def test_damaged_cache_is_made_again(tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture) -> None:
    whole = np.array(cached_images(split, 16, tmp_path / "cache", progress=False))
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        again = cached_images(split, 16, tmp_path / "cache", progress=False)
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(again, whole)


def test_failure_leaves_nothing_behind(tmp_path: Path, split: Split) -> None:
    (split.folder / split.paths[7]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"test_007\.jpg cannot be decoded"):
        cached_images(split, 16, tmp_path / "cache", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_goes_without(
    tmp_path: Path, split: Split, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_ROOM_TO_LEAVE", 1 << 60)
    with caplog.at_level(logging.WARNING):
        assert cached_images(split, 16, tmp_path / "cache", progress=False) is None
    assert "no image cache for test" in caplog.text
