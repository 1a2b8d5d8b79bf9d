from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode, Resize

from eva_lightning.vision.data.images import image_damage, load_image


def photo(height: int = 60, width: int = 90) -> Image.Image:
    """Smooth colour gradients."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_pixels_are_torchvisions_bicubic_resize(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    expected = Resize((32, 32), interpolation=InterpolationMode.BICUBIC)(photo())
    found = load_image(tmp_path / "a.png", 32)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected).transpose(2, 0, 1))


def test_greyscale_jpeg_has_three_equal_channels(tmp_path: Path) -> None:
    photo().convert("L").save(tmp_path / "a.jpg")
    found = load_image(tmp_path / "a.jpg", 16)
    assert found.shape == (3, 16, 16)
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("P", "gif"), ("YCbCr", "jpg")]
)
def test_modes_keep_the_colours(tmp_path: Path, mode: str, suffix: str) -> None:
    photo().convert(mode).save(tmp_path / f"a.{suffix}")
    photo().save(tmp_path / "rgb.png")
    difference = load_image(tmp_path / f"a.{suffix}", 16).astype(int) - load_image(tmp_path / "rgb.png", 16)
    assert np.abs(difference).mean() < 12


def test_transparent_palette_and_bilevel(tmp_path: Path) -> None:
    photo().convert("P").save(tmp_path / "a.png", transparency=0)
    photo().convert("1").save(tmp_path / "b.png")
    photo().convert("LA").save(tmp_path / "c.png")
    for name in "abc":
        assert load_image(tmp_path / f"{name}.png", 8).shape == (3, 8, 8)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.full((10, 10), 32896, dtype=np.uint16)  # 128 * 257
    values[:, 5:] = 65535
    Image.fromarray(values).save(tmp_path / "a.png")
    found = load_image(tmp_path / "a.png", 10)
    assert found[0, 5, 0] == 128
    assert found[2, 5, 9] == 255


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_decoded_as_far_as_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, progressive: bool
) -> None:
    photo(200, 200).save(tmp_path / "whole.jpg", quality=95, progressive=progressive)
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: int(len(data) * 0.6)])
    with caplog.at_level(logging.WARNING):
        cut = load_image(tmp_path / "cut.jpg", 20)
    assert "cut.jpg is truncated" in caplog.text
    whole = load_image(tmp_path / "whole.jpg", 20)
    assert np.abs(cut[:, :4].astype(int) - whole[:, :4]).mean() < 25
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\xff\xd8\xff\xe0broken"])
def test_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be decoded .*: (convert it, )?copy it again, or leave it out"):
        load_image(tmp_path / "bad.jpg", 8)


def test_truncated_png_is_named(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        load_image(tmp_path / "a.png", 8)


def test_damage_is_what_loading_would_find(tmp_path: Path) -> None:
    photo(200, 200).save(tmp_path / "whole.jpg", quality=95)
    photo(200, 200).save(tmp_path / "whole.png")
    photo(200, 200).convert("L").save(tmp_path / "grey.jpg")
    jpeg, png = (tmp_path / "whole.jpg").read_bytes(), (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "end.jpg").write_bytes(jpeg[:-20])
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "text.jpg").write_bytes(b"<html>not found</html>")
    found = {name: image_damage(tmp_path / name) for name in sorted(path.name for path in tmp_path.iterdir())}
    assert found == {
        "cut.jpg": "truncated",
        "cut.png": "broken",
        "end.jpg": "truncated",
        "grey.jpg": None,
        "text.jpg": "broken",
        "whole.jpg": None,
        "whole.png": None,
    }
