"""What parsers raise on bad bytes is one error that names the file; nothing is read that is not bounded."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.errors import InputError, InputTypeError, MissingInputError, check_number
from eva_lightning.files import as_json, with_numbers, write_json
from eva_lightning.reading import parse_json, read_bytes, read_json, read_text, reading, typed
from eva_lightning.sealed import read_sealed_json, write_sealed_json


class PanicException(BaseException):
    """As parsers written in Rust raise it (pyo3_runtime.PanicException)."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("torn\nsecond line"), r"weights a\.pth is damaged \(torn\): download it"),
        (KeyError("x"), r"a\.pth is damaged \(KeyError 'x'\)"),
        (AssertionError(), r"a\.pth is damaged \(AssertionError\)"),
        (MemoryError(), "asks for more memory than there is"),
        (RecursionError("maximum"), "is nested too deeply"),
        (PanicException("index out of bounds"), r"damaged \(index out of bounds\)"),
        (OSError("Invalid data stream"), r"is damaged \(Invalid data stream\)"),
        (OSError(errno.EIO, "x"), r"cannot be read \(input/output error\)"),
        (InputError("no numbers"), r"a\.pth is damaged \(no numbers\)"),
        (InputError("a.pth holds a list"), r"^a\.pth holds a list$"),
        (ValueError("\x1b[2J\u202e"), r"\(\?\[2J\?\)"),
    ],
)
def test_whatever_a_parser_raises_names_the_file(error: BaseException, message: str) -> None:
    with pytest.raises(InputError, match=message) as found, reading("a.pth", "download it", "weights"):
        raise error
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_is_no_fault_of_a_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)), reading("a.pth"):
        raise error


def test_a_full_disk_is_not_the_files_fault() -> None:
    with pytest.raises(OSError, match="No space") as found, reading("a.pth"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not isinstance(found.value, InputError)


def test_only_ordinary_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for path, message in (
        (tmp_path / "pipe", "no ordinary file"),
        (Path("/dev/zero"), "no ordinary file"),
        (tmp_path, "is a folder"),
        (tmp_path / "large", "larger than the 4 B"),
    ):
        with pytest.raises(InputError, match=message):
            read_bytes(path, 4)
    with pytest.raises(MissingInputError, match="none does not exist"):
        read_bytes(tmp_path / "none", 4)
    (tmp_path / "text").write_bytes(b"one\ntwo\xff")
    with pytest.raises(InputError, match=r"line 2: no text in UTF-8"):
        read_text(tmp_path / "text")


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[" * 100_000, "9" * 5000, '{"a": Infinity}'],
    ids=list("abcdefgh"),
)
def test_bad_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json is damaged \(.*\): remedy"):
        read_json(tmp_path / "a.json", "remedy")


def test_numbers_that_are_not_finite_are_words_in_json(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    document = {"a": [nan, inf, (-inf, 0.5)], "b": {"c": inf}, "d": None, "e": "text", "f": True, "g": 10**30}
    write_json(tmp_path / "a.json", document)

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON")

    raw = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert raw["a"] == ["NaN", "Infinity", ["-Infinity", 0.5]]
    found = with_numbers(raw)
    assert str(found["a"]) == "[nan, inf, [-inf, 0.5]]"
    assert {name: found[name] for name in "bdefg"} == {name: document[name] for name in "bdefg"}
    with pytest.raises(TypeError):
        as_json({"a": object()})


def test_a_sealed_document_without_its_checksum_is_refused_and_an_older_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_sealed_json(file, {"accuracy": 0.5, "loss": float("nan")})
    assert with_numbers(read_sealed_json(file))["accuracy"] == 0.5
    lines = file.read_text().splitlines()
    (mark,) = [line for line in lines if '"checksum"' in line]
    file.write_text("\n".join(line for line in lines if line != mark).replace('"NaN",', '"NaN"'))
    json.loads(file.read_text())
    with pytest.raises(InputError, match="checksum differs"):
        read_sealed_json(file)
    for older in ('{"accuracy": 0.5}', '{\n  "accuracy": 0.5\n}\n'):
        file.write_text(older)
        assert read_sealed_json(file) == {"accuracy": 0.5}


@dataclass(frozen=True)
class Entry:
    """One of each kind."""

    name: str
    n: int
    x: float
    on: bool
    words: tuple[str, ...]
    versions: Mapping[str, str]


ENTRY = {"name": "a", "n": 1, "x": 2, "on": True, "words": ["b"], "versions": {"numpy": "2"}}


def test_entries_of_the_right_types() -> None:
    assert typed(Entry, {**ENTRY, "other": 1}, "i.json") == Entry("a", 1, 2, True, ("b",), {"numpy": "2"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", 1),
        ("name", None),
        ("n", 1.5),
        ("n", True),
        ("n", "1"),
        ("x", "1"),
        ("x", True),
        ("on", 1),
        ("words", "b"),
        ("words", [1]),
        ("versions", []),
        ("versions", {"numpy": 2}),
        ("n", [1]),
        ("x", float("nan")),
        ("x", float("inf")),
        ("x", 10**400),
    ],
)
def test_entries_of_wrong_types_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputTypeError, match=rf"i\.json is damaged: {name} has another type"):
        typed(Entry, {**ENTRY, name: value}, "i.json")


def test_entries_that_are_missing() -> None:
    with pytest.raises(InputError, match=r"i\.json is damaged: words is missing"):
        typed(Entry, {name: value for name, value in ENTRY.items() if name != "words"}, "i.json")
    with pytest.raises(InputTypeError, match="a mapping is expected, got list"):
        typed(Entry, [], "i.json")


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000, float("inf"), float("nan")], ids=list("abcde"))
def test_numbers_beyond_all_floats_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="n must be a number of at least 0, got ") as found:
        check_number("n", value, at_least=0)
    assert len(str(found.value)) < 200


def test_json_is_parsed_as_python_does() -> None:
    text = '{"a": [1, 2.5, null, true, "x"], "b": {}}'
    assert parse_json(text, "a.json") == json.loads(text)
    assert str(parse_json('{"a": NaN}', "a.json", non_finite=True)) == "{'a': nan}"
