"""The one place where image files are decoded: the formats of the benchmarks and no others, within bounded memory.

Pillow opens a file by its content, not its name, and knows 50 formats: of some it starts other programs (Ghostscript
for EPS), of others it calls large decoders that nobody attacks but everybody has (TIFF, JPEG 2000). VTAB-1K is JPEG and
PNG; among the originals, Oxford-IIIT Pet and SUN397 have a few GIF and BMP files named ``.jpg``.
"""

from __future__ import annotations

import io
import os

from PIL import Image, UnidentifiedImageError

from eva_lightning.errors import InputError
from eva_lightning.reading import read_bytes

FORMATS = ("JPEG", "PNG", "GIF", "BMP")

#: Pixels of the largest image that is decoded: 0.2 GB. The largest originals (Retinopathy) have 18 million.
MOST_PIXELS = 50_000_000
#: Bytes of the largest file that is read: so many pixels without compression.
MOST_BYTES = 4 * MOST_PIXELS
#: A progressive JPEG goes over all its pixels once per scan. Encoders write about 10; 1,000 would take minutes.
_MOST_SCANS = 200
_START_OF_SCAN = b"\xff\xda"
JPEG_START = b"\xff\xd8"


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no ordinary file, or too large.
    """
    return read_bytes(path, MOST_BYTES, what="image")


def open_image(data: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not decoded yet; of animations, the first picture.

    Raises:
        InputError: It is none of `FORMATS`, or would take too much memory or time.
        Exception: It is damaged: whatever Pillow raises.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise InputError(f"{width} x {height} pixels are more than the {MOST_PIXELS} that are decoded")
    if data.startswith(JPEG_START) and data.count(_START_OF_SCAN) > _MOST_SCANS:
        raise InputError(f"it has more than the {_MOST_SCANS} scans that are decoded")
    return image
