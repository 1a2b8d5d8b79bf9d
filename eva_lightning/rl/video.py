"""Pictures of episodes as GIF or MP4 files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2
import imageio.v3 as iio
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from eva_lightning.errors import InputError, check_number
from eva_lightning.files import replacing

Frames = npt.NDArray[np.uint8]

#: Simulator steps per second of the robot's time.
STEPS_PER_SECOND = 80
#: Steps per frame of a video, by default: real time at 20 frames per second, in a quarter of the size.
STRIDE = 4

FORMATS = (".gif", ".mp4")

_GAP = 4
_LEAST_BAND = 20
#: Labels are white on this, with a contrast of 15 to 1.
_BAND_COLOUR = "#1f2937"


def check_format(path: str | Path) -> Path:
    """`path`, if a video can be written there.

    Raises:
        InputError: The name does not end in ``.gif`` or ``.mp4``, or there is no ffmpeg for an MP4.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InputError(f"a video file must end in {' or '.join(FORMATS)}, got {os.fspath(path)!r}")
    reason = no_mp4_reason() if suffix == ".mp4" else None
    if reason is not None:
        raise InputError(f"{reason}, or name a .gif, got {os.fspath(path)!r}")
    return Path(path)


def no_mp4_reason() -> str | None:
    """One sentence for where no MP4 can be written: what is missing, and what to install; None where one can."""
    try:
        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return "no MP4: there is no ffmpeg here; install the package imageio-ffmpeg, which brings one"
    return None


def write_video(episodes: Sequence[Frames], path: str | Path, stride: int = STRIDE) -> Path:
    """Write episodes one after the other, in real time; the file appears when it is complete.

    Args:
        episodes: Pictures of each, ``(T, H, W, 3)`` uint8, one per step, all of one size.
        path: Ends in ``.gif`` or ``.mp4``.
        stride: Steps per frame written; the last frame of an episode is always among them.

    Returns:
        The file.

    Raises:
        InputError: The name ends otherwise, `stride` is below 1, or there is no frame.
    """
    path = check_format(path)
    check_number("stride", stride, at_least=1, whole=True)
    if not episodes or not all(len(episode) for episode in episodes):
        raise InputError("a video needs at least one frame of each episode, got none")
    frames = np.concatenate([thinned(episode, stride) for episode in episodes])
    rate = STEPS_PER_SECOND / stride
    with replacing(path) as temporary:
        if path.suffix.lower() == ".gif":
            iio.imwrite(temporary, frames, extension=".gif", plugin="pillow", duration=1000 / rate, loop=0)
        else:
            _write_mp4(frames, temporary, rate)
    return path


def write_picture(frame: Frames, path: Path) -> Path:
    """Write one frame ``(H, W, 3)`` as PNG."""
    with replacing(path) as temporary:
        iio.imwrite(temporary, frame, extension=".png")
    return path


def thinned(frames: Frames, stride: int) -> Frames:
    """Every `stride`-th frame ``(T', H, W, 3)``, and the last."""
    last = len(frames) - 1
    return frames[sorted({*range(0, last, stride), last})]


def side_by_side(before: Frames, after: Frames, labels: tuple[str, str] = ("before", "after")) -> Frames:
    """Two episodes as one frame per step, labelled; the shorter one waits at its last frame.

    Args:
        before: ``(T, H, W, 3)`` uint8, on the left.
        after: ``(T', H, W', 3)`` uint8.
        labels: What stands above them.

    Returns:
        ``(max(T, T'), B + H, W + 4 + W', 3)``; the band B above the pictures is an eighth of their height, at least 20.

    Raises:
        InputError: The heights differ.
    """
    if before.shape[1] != after.shape[1]:
        raise InputError(f"both episodes must have frames of one height, got {before.shape[1]} and {after.shape[1]}")
    steps = max(len(before), len(after))
    left, right = (frames[np.minimum(np.arange(steps), len(frames) - 1)] for frames in (before, after))
    gap = np.full((steps, left.shape[1], _GAP, 3), 255, np.uint8)
    pictures = np.concatenate((left, gap, right), axis=2)
    height = max(_LEAST_BAND, 2 * (pictures.shape[1] // 16))
    bands = [
        _label(labels[0], left.shape[2], height),
        gap[0, :1].repeat(height, axis=0),
        _label(labels[1], right.shape[2], height),
    ]
    band = np.concatenate(bands, axis=1)
    return np.concatenate((np.broadcast_to(band, (steps, *band.shape)), pictures), axis=1)


def _label(text: str, width: int, height: int) -> Frames:
    """`text` in white on dark, as large as `height` and `width` allow, ``(height, width, 3)``."""
    image = Image.new("RGB", (width, height), _BAND_COLOUR)
    draw = ImageDraw.Draw(image)
    for size in range(int(0.66 * height), 5, -1):
        font = ImageFont.load_default(size)
        if draw.textlength(text, font=font) <= width - 8:
            break
    draw.text((4, height / 2), text, fill="white", font=font, anchor="lm")
    return np.asarray(image, dtype=np.uint8)


def _write_mp4(frames: Frames, path: Path, rate: float) -> None:
    # players want even sizes
    height, width = (size + size % 2 for size in frames.shape[1:3])
    padding = ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0))
    # the index first, so that a page plays it before it has all of it
    options = {"codec": "libx264", "macro_block_size": 2, "ffmpeg_log_level": "error",
               "output_params": ["-movflags", "+faststart"]}  # fmt: skip
    writer: Any = imageio.v2.get_writer(path, format="FFMPEG", fps=rate, **options)  # type: ignore[arg-type]
    with writer:
        for frame in np.pad(frames, padding, mode="edge"):
            writer.append_data(frame)
