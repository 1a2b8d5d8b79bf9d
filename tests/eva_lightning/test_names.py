from __future__ import annotations

from pathlib import Path

import pytest

from eva_lightning.errors import InputError, InputTypeError
from eva_lightning.names import check_length, check_name, check_path, unsafe_because

SAFE = ("a", "vit-b.16", ".hidden", "-x", "a b", "é" * 127, "日本語", "می\u200cخواهم", "👍", "a" * 255)
UNSAFE = (
    "", " ", ".", "..", "a/b", "/a", "a\\b", "..\\a", "C:a", "a\0b", "a\nb", "a\x7f", "a\x85", "\u202egnp.exe",
    "a\u200b", "a\u2028b", "\ud800", " a", "a ", "a.", "...", "é" * 128, "a" * 256,
)  # fmt: skip


@pytest.mark.parametrize("name", SAFE)
def test_safe_names_are_what_the_file_system_takes_in_one_folder(tmp_path: Path, name: str) -> None:
    assert check_name("name", name) == name
    (tmp_path / name).write_text("")
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_unsafe_names_are_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(InputError) as error:
        check_name("the name", name, setting="name")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 250
    assert error.value.setting == "name"


@pytest.mark.parametrize("name", [None, 3, ["a"], b"a"])
def test_what_is_no_text_is_no_name(name: object) -> None:
    with pytest.raises(InputTypeError):
        check_name("name", name)
    with pytest.raises(InputTypeError):
        check_path("path", name)


def test_room_for_what_is_added() -> None:
    assert unsafe_because("a" * 250, room=5) is None
    assert unsafe_because("a" * 250, room=6) == "it has 250 bytes, and 249 is the most"


@pytest.mark.parametrize(
    ("path", "same"), [("a/b.jpg", "a/b.jpg"), ("./a//b", "a/b"), ("a/", "a"), ("ü/x y.png", "ü/x y.png")]
)
def test_paths_below_a_folder(path: str, same: str) -> None:
    assert check_path("path", path).as_posix() == same


@pytest.mark.parametrize(
    "path", ["", ".", "/a", "//a", "../a", "a/../b", "a/..", "a\\..\\b", "C:/a", "a/\0", "a/" + "b" * 256]
)
def test_paths_that_leave_or_cannot_be_are_refused(path: str) -> None:
    with pytest.raises(InputError, match="must be a relative path inside its folder"):
        check_path("path", path)


def test_a_path_too_long_for_the_system_is_said(tmp_path: Path) -> None:
    assert check_length("output", tmp_path) == tmp_path
    with pytest.raises(InputError, match="a name of 300 bytes, and 255 is the most"):
        check_length("output", tmp_path / ("a" * 300))
    with pytest.raises(InputError, match="4095 is the most"):
        check_length("output", tmp_path.joinpath(*["a" * 200] * 21))
