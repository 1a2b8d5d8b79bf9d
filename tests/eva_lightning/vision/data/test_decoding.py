"""Image files of strangers: only JPEG, PNG, GIF and BMP are decoded, no other program starts, memory is bounded."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from eva_lightning.errors import InputError
from eva_lightning.vision.data.decoding import MOST_PIXELS
from eva_lightning.vision.data.images import image_damage, load_image
from tests.paths import ROOT

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(kind: str, size: tuple[int, int] = (8, 8), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG file whose head promises `width` x `height` pixels of RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_formats_of_the_benchmarks_are_decoded_whatever_their_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(kind))
    assert np.abs(load_image(tmp_path / "a.jpg", 4)[:, 0, 0].astype(int) - (200, 10, 30)).max() < 8
    assert image_damage(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PPM", "ICO", "PCX", "JPEG2000", "TGA", "DIB", "PDF", "EPS"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    missing = {"WEBP": "webp", "JPEG2000": "jpg_2000"}.get(kind)
    if missing and not features.check(missing):
        pytest.skip(f"this Pillow cannot write {kind}")
    (tmp_path / "a.jpg").write_bytes(encoded(kind))
    with pytest.raises(InputError, match=r"a\.jpg cannot be decoded \(it is no JPEG, PNG, GIF or BMP file\)"):
        load_image(tmp_path / "a.jpg", 4)
    assert image_damage(tmp_path / "a.jpg") == "broken"


def test_no_other_program_is_started(tmp_path: Path) -> None:
    """A `gs` that is first in PATH: Pillow starts it for an EPS file, whatever the file is called."""
    (tmp_path / "bin").mkdir()
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/STARTED\nexit 1\n")
    ghostscript.chmod(0o755)
    (tmp_path / "a.jpg").write_bytes(EPS)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    pillow = f"from PIL import Image; Image.open({str(tmp_path / 'a.jpg')!r}).load()"
    subprocess.run([sys.executable, "-c", pillow], env=environment, capture_output=True, timeout=60)
    assert (tmp_path / "STARTED").exists()
    (tmp_path / "STARTED").unlink()
    ours = (
        "from PIL import Image; Image.init()\n"  # as another library may have done
        "from eva_lightning.vision.data.images import image_damage\n"
        f"print(image_damage({str(tmp_path / 'a.jpg')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ours], env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stdout == "broken\n", done.stderr
    assert not (tmp_path / "STARTED").exists()


@pytest.mark.parametrize(
    "content",
    [
        png_of(MOST_PIXELS, 2),
        png_of(2**31 - 1, 2**31 - 1),
        png_of(9000, 9000, zlib.compress(bytes(9000 * 27001), 1)),
        encoded("GIF").replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 65535, 65535)),
        encoded("BMP").replace(struct.pack("<ii", 8, 8), struct.pack("<ii", 60000, 60000)),
        encoded("JPEG").replace(b"\x00\x11\x08\x00\x08\x00\x08", b"\x00\x11\x08\xff\xf0\xff\xf0"),
    ],
    ids=["png", "largest png", "whole png", "gif", "bmp", "jpeg"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    script = (
        "import resource, sys\n"
        "from eva_lightning.vision.data.images import image_damage, load_image\n"
        "from eva_lightning.errors import InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"file = {str(tmp_path / 'a.png')!r}\n"
        "assert image_damage(file) == 'broken'\n"
        "try: load_image(file, 8)\n"
        "except InputError as error: print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, 'over 20 MB'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert "a.png cannot be decoded" in done.stdout, done.stderr
    assert "pixels" in done.stdout
    assert done.returncode == 0, done.stderr


def test_of_an_animation_the_first_picture_is_decoded(tmp_path: Path) -> None:
    pictures = [Image.new("L", (64, 64), i % 256) for i in range(1000)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    assert set(load_image(tmp_path / "a.gif", 8).ravel()) == {0}


def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path: Path) -> None:
    whole = encoded("JPEG", (64, 64), progressive=True)
    start = whole.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(whole[:start] + whole[start:-2] * 1000 + whole[-2:])
    with pytest.raises(InputError, match="its 1009 scans are more"):
        load_image(tmp_path / "a.jpg", 8)


def test_what_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("pipe.jpg", "no ordinary file"), (".", "is a folder")):
        with pytest.raises(InputError, match=reason):
            load_image(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg does not exist"):
        load_image(tmp_path / "none.jpg", 8)
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(2**40)  # a hole: takes no room
    with pytest.raises(InputError, match="is larger than"):
        load_image(tmp_path / "large.jpg", 8)


def test_a_large_jpeg_of_many_scans_is_refused(tmp_path: Path) -> None:
    data = encoded("JPEG", (5000, 5000), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    (tmp_path / "a.jpg").write_bytes(data[:-2] + 30 * last + data[-2:])
    with pytest.raises(InputError, match="scans are more than are decoded of an image of 5000 x 5000 pixels"):
        load_image(tmp_path / "a.jpg", 8)
    (tmp_path / "a.jpg").write_bytes(data)
    assert load_image(tmp_path / "a.jpg", 8).shape == (3, 8, 8)


def _run_lengths(count: int) -> bytes:
    """A BMP of 7000 x 7000 pixels, a run of one pixel each."""
    head = struct.pack("<IiiHHIIiiII", 40, 7000, 7000, 1, 8, 1, 0, 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(head)) + head + b"\x01\x00" * count


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8" + b"\xff\xfe\x00\x03a" * 5_000_000 + encoded("JPEG")[2:],
        b"\xff\xd8" + b"\xff" * 50_000_000 + encoded("JPEG")[2:],
        b"\xff\xd8" + b"\0" * 50_000_000 + encoded("JPEG")[2:],
        png_of(8, 8)[:33] + b"\0\0\0\x03tEXta\0b\x2a\x2a\x2a\x2a" * 2_000_000 + png_of(8, 8)[33:],
        encoded("GIF")[:13] + b"\x21\xfe\x01a\0" * 8_000_000 + encoded("GIF")[13:],
        _run_lengths(20_000_000),
    ],
    ids=["comments", "fill bytes", "junk", "chunks", "extensions", "run lengths"],
)
def test_files_that_take_minutes_are_refused_at_once(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    started = time.process_time()
    with pytest.raises(InputError, match=r"comments or chunks that are read|run-length"):
        load_image(tmp_path / "a.jpg", 8)
    assert time.process_time() - started < 5
