"""The one place where image files are decoded: the formats of the benchmarks and no others, within bounded memory.

Pillow opens a file by its content, not its name, and knows 50 formats: of some it starts other programs (Ghostscript
for EPS), of others it calls large decoders that nobody attacks but everybody has (TIFF, JPEG 2000). VTAB-1K is JPEG and
PNG; among the originals, Oxford-IIIT Pet and SUN397 have a few GIF and BMP files named ``.jpg``.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from eva_lightning.errors import InputError
from eva_lightning.ours import is_marked
from eva_lightning.reading import read_bytes

FORMATS = ("JPEG", "PNG", "GIF", "BMP")
_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp"})
#: Of images that people keep and that are not decoded.
_OTHER_SUFFIXES = frozenset(
    {".webp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".jp2", ".j2k", ".jxl", ".heic", ".heif", ".avif", ".tga",
     ".dib", ".psd", ".svg", ".exr", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
)  # fmt: skip

#: Pixels of the largest image that is decoded: 0.2 GB. The largest originals (Retinopathy) have 18 million.
MOST_PIXELS = 50_000_000
#: Bytes of the largest file that is read: so many pixels without compression.
MOST_BYTES = 4 * MOST_PIXELS
#: A progressive JPEG goes over all its pixels once per scan. Encoders write about 10; 1,000 would take minutes.
_MOST_SCANS, _USUAL_SCANS = 200, 20
#: Pillow unpacks a run-length encoded BMP in Python, a second per million bytes; no benchmark has any.
_MOST_RUN_LENGTHS = 2**20
_START_OF_SCAN = b"\xff\xda"
JPEG_START = b"\xff\xd8"
#: Parts of a file that Pillow goes through in Python, a few microseconds each: comments, chunks, extensions. An image
#: has a hundred, and pixels that look like them are rare; only large files can have so many.
_MOST_PARTS, _HARMLESS = 300_000, 2**20
_PARTS = {b"\x89PNG": rb"[A-Za-z]{4}", b"GIF8": rb"!"}


class OversizedImageError(InputError):
    """An image that would take too much memory or time."""


def image_files(folder: Path) -> list[Path]:
    """The images in `folder` and below it, by their names, sorted; hidden files and folders are passed over, and
    the runs of this project, with their figures.

    Links to files count as what they lead to; links to folders below `folder` are not followed.

    Raises:
        InputError: A folder cannot be read, a link leads nowhere, or an image is of a format that is not decoded: each
            would be missing without a word.
    """
    files = sorted(_files_below(folder))
    strange = next((path for path in files if path.suffix.lower() in _OTHER_SUFFIXES and path.is_file()), None)
    if strange is not None:
        raise InputError(
            f"{strange} is of a format that is not read: convert it to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or "
            "move it away"
        )
    images = [path for path in files if path.suffix.lower() in _SUFFIXES]
    lost = next((path for path in images if path.is_symlink() and not path.exists()), None)
    if lost is not None:
        raise InputError(f"the image {lost} is a link that leads nowhere: copy the file itself there, or remove the link")
    return [path for path in images if path.is_file()]


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        where = error.filename or folder
        raise InputError(f"the folder {where} cannot be read ({error.strerror}): make it readable, or move it away")

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not (name.startswith(".") or is_marked(Path(place, name)))]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no ordinary file, or too large.
    """
    return read_bytes(path, MOST_BYTES, what="image")


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image whose header is read and whose pixels are not decoded yet; of animations, the first picture.

    Args:
        data: The bytes of its file.
        formats: What it may be, by Pillow's names.

    Raises:
        InputError: It is none of `formats`, or would take too much memory or time.
        Exception: It is damaged: whatever Pillow raises.
    """
    _refuse_many_parts(data)
    # before Pillow, which warns of such files first
    _refuse_many_pixels(*_size_in_header(data))
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise InputError(f"it is no {', '.join(formats[:-1])} or {formats[-1]} file") from None
    width, height = image.size
    _refuse_many_pixels(width, height)
    if image.format == "BMP" and image.info.get("compression") in (1, 2) and len(data) > _MOST_RUN_LENGTHS:
        raise OversizedImageError(f"it is a run-length encoded BMP of more than {_MOST_RUN_LENGTHS} bytes")
    scans = data.count(_START_OF_SCAN) if data.startswith(JPEG_START) else 0
    if scans > _MOST_SCANS or (scans > _USUAL_SCANS and scans * width * height > _USUAL_SCANS / 2 * MOST_PIXELS):
        raise OversizedImageError(f"its {scans} scans are more than are decoded of an image of {width} x {height} pixels")
    return image


def _refuse_many_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise OversizedImageError(f"{width} x {height} pixels are more than the {MOST_PIXELS} that are decoded")


def _size_in_header(data: bytes) -> tuple[int, int]:
    """Width and height as the header has them; zeros where it has none."""
    if data.startswith(b"\x89PNG"):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data.startswith(b"GIF8"):
        return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    if data.startswith(b"BM"):
        return int.from_bytes(data[18:22], "little"), abs(int.from_bytes(data[22:26], "little", signed=True))
    if data.startswith(JPEG_START):
        for at in _before_the_first_scan(data):
            # the start of a frame has the size; C4, C8 and CC are other segments
            if data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xCF and data[at + 1] not in (0xC4, 0xC8, 0xCC):
                return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
    return 0, 0


def _refuse_many_parts(data: bytes) -> None:
    if data.startswith(JPEG_START):
        parts: Iterator[object] = _before_the_first_scan(data)
    elif len(data) > _HARMLESS and (patterns := [_PARTS[start] for start in _PARTS if data.startswith(start)]):
        parts = re.finditer(patterns[0], data)
    else:
        return
    if next(itertools.islice(parts, _MOST_PARTS, None), None) is not None:
        raise OversizedImageError(f"it has more than the {_MOST_PARTS} comments or chunks that are read")


def _before_the_first_scan(data: bytes) -> Iterator[int]:
    """The steps that Pillow takes in a JPEG file: segments, and single bytes between them."""
    at = len(JPEG_START)
    while at + 4 <= len(data) and not data.startswith(_START_OF_SCAN, at):
        yield at
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0, 0xFF):
            at += 1
        else:
            alone = 0xD0 <= marker <= 0xD9
            at += 2 if alone else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
