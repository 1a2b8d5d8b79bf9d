from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from eva_lightning.rl.video import Frames, check_format, side_by_side, thinned, write_video


def episode(steps: int, height: int = 16, width: int = 16) -> Frames:
    frames = np.zeros((steps, height, width, 3), np.uint8)
    frames[:, : height // 2, :, 0] = np.linspace(40, 250, steps).astype(np.uint8)[:, None, None]
    return frames


def test_every_fourth_picture_and_the_last() -> None:
    frames = episode(11)
    assert np.array_equal(thinned(frames, 4), frames[[0, 4, 8, 10]])
    assert np.array_equal(thinned(frames, 1), frames)
    assert len(thinned(frames[:1], 4)) == 1


def test_gif_has_the_pictures_in_real_time(tmp_path: Path) -> None:
    path = write_video([episode(9), episode(5)], tmp_path / "new" / "a.gif")
    assert [p.name for p in path.parent.iterdir()] == ["a.gif"]
    read = iio.imread(path)
    assert read.shape == (3 + 2, 16, 16, 3)
    np.testing.assert_allclose(read[0, 0, 0], episode(9)[0, 0, 0], atol=4)
    np.testing.assert_allclose(read[2, 0, 0], episode(9)[8, 0, 0], atol=4)
    assert iio.immeta(path)["duration"] == 50


def test_mp4_also_of_odd_size(tmp_path: Path) -> None:
    path = write_video([episode(9, 31, 33)], tmp_path / "a.MP4", stride=1)
    read = iio.imread(path, plugin="FFMPEG")
    assert read.shape == (9, 32, 34, 3)
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 80
    np.testing.assert_allclose(read[8, 3, 3].astype(int), [250, 0, 0], atol=25)


def test_side_by_side_waits_for_the_longer_one() -> None:
    before, after = episode(3), episode(5, width=20)
    joined = side_by_side(before, after)
    assert joined.shape == (5, 16 + 20, 16 + 4 + 20, 3)
    assert np.array_equal(joined[4, 20:, :16], before[2])
    assert np.array_equal(joined[4, 20:, 20:], after[4])
    assert (joined[:, :20] > 200).any()


def test_labels_are_large_and_stand_out() -> None:
    """As WCAG 2 measures contrast; the capital letters of a film of 320 pixels are 15 high or more."""
    joined = side_by_side(episode(1, 320, 320), episode(1, 320, 320), ("H", "EVA, 50 steps: not solved"))
    assert joined.shape == (1, 40 + 320, 320 + 4 + 320, 3)
    band = joined[0, :40] / 255.0
    linear = np.where(band <= 0.04045, band / 12.92, ((band + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    left, right = luminance[:, :320], luminance[:, 324:]
    assert (left.max() + 0.05) / (left.min() + 0.05) > 7
    rows = np.flatnonzero((left > 0.5).any(axis=1))
    assert rows[-1] - rows[0] + 1 >= 15
    # the longest label is as large as its half of the band allows, and whole
    columns = np.flatnonzero((right > 0.5).any(axis=0))
    assert 200 < columns[-1] - columns[0] < 320
    assert columns[-1] < 316


def test_without_ffmpeg_an_mp4_is_refused_before_anything_is_rolled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(ValueError, match=r"^no MP4: there is no ffmpeg here; .*, got 'a\.mp4'$"):
        check_format("a.mp4")
    assert check_format("a.gif") == Path("a.gif")


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.gif or \.mp4, got 'a\.avi'"):
        write_video([episode(2)], "a.avi")
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1, got 0"):
        write_video([episode(2)], tmp_path / "a.gif", stride=0)
    with pytest.raises(ValueError, match="at least one frame of each episode, got none"):
        write_video([], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="one height, got 16 and 18"):
        side_by_side(episode(2), episode(2, 18))
    assert list(tmp_path.iterdir()) == []
