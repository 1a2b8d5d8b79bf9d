"""From an image file to resized uint8 pixels, for the image files that real data sets hold.

Pixels follow the pipelines in use for VTAB-1K: RGB, the whole image squeezed to a square by bicubic interpolation with
antialiasing (Pillow), no crop. Alpha is dropped and EXIF rotation ignored, as ``torchvision``'s default loader does.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from eva_lightning.errors import InputError
from eva_lightning.reading import in_short
from eva_lightning.vision.data.decoding import JPEG_START, OversizedImageError, open_image, read_image_file

logger = logging.getLogger(__name__)

_JPEG_END = b"\xff\xd9"


def load_image(path: str | Path, size: int) -> npt.NDArray[np.uint8]:
    """Decode one image and resize it to ``size x size``.

    Handles greyscale, palette, alpha, CMYK and 16-bit images. A JPEG that breaks off early is decoded as far as it
    goes, the rest is grey, and a warning is logged.

    Args:
        path: Image file.
        size: Height and width wanted, in pixels.

    Returns:
        Pixels ``(3, size, size)``, RGB in 0..255.

    Raises:
        MissingInputError: There is no such file.
        InputError: The file cannot be decoded at all, or is none of a benchmark; the message names it.
    """
    data = read_image_file(path)
    try:
        image = _decode(data)
    except Exception as error:
        # Pillow reports damaged files by OSError, SyntaxError, ValueError, EOFError or struct.error, by format
        remedy = "copy it again"
        if isinstance(error, InputError):  # it is whole, and too large or of another format
            remedy = "make it smaller" if isinstance(error, OversizedImageError) else f"convert it, {remedy}"
        broken = InputError(f"image {path} cannot be decoded ({in_short(error)}): {remedy}, or leave it out")
        if not data.startswith(JPEG_START):
            raise broken from None
        try:
            # an end marker makes libjpeg fill in what is missing; Pillow's own switch for this is global to the process
            image = _decode(data + _JPEG_END)
        except Exception:
            raise broken from None
        logger.warning("image %s is truncated: the missing part is filled in with grey", path)
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))


def image_damage(path: str | Path) -> Literal["broken", "truncated"] | None:
    """What :func:`load_image` would find wrong with an image file: nothing, an early end, or all of it.

    A JPEG is decoded to an eighth of its size: its whole bit stream is read, at a third of the time.

    Raises:
        InputError: The file cannot be read.
    """
    data = read_image_file(path)
    try:
        image = open_image(data)
        image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        to_rgb(image)
    except Exception:
        if not data.startswith(JPEG_START):
            return "broken"
        try:
            _decode(data + _JPEG_END)
        except Exception:
            return "broken"
        return "truncated"
    return None


def _decode(data: bytes) -> Image.Image:
    image = open_image(data)
    image.load()
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB version of an image of any Pillow mode.

    ``convert("RGB")`` clips 16-bit images at 255; here their values are scaled by 1/257.
    """
    if image.mode.startswith("I"):
        # fp32 holds these quotients well enough to round them as fp64 does, in half the memory
        values = np.asarray(image).astype(np.float32)
        values /= 257.0 if values.max() > 255 or image.mode != "I" else 1.0
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
