"""Ways to damage a file: of its bytes, of the numbers in its text, of the structure of its JSON."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"7",
    b"1e999",
    b"-1e999",
    b"NaN",
    b"Infinity",
    b".inf",
    b".nan",
    b"null",
    b"true",
    b'"x"',
    b"[]",
    b"{}",
    b"9" * 19,
    b"9" * 400,
    b"9" * 5000,
    b"1e308",
    b"2147483648",
    b"18446744073709551616",
    b"0.5",
]
_WORDS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"'",
    b'"',
    b"[" * 3000,
    b"{" * 50,
    b"*a",
    b"&a",
    b"<<: *a",
    b"!!python/name:os.system",
    b"../",
    b"/etc/passwd",
    b": ",
    b"\n- ",
    b"\n",
    b"\x1b[2J",
    b"\xe2\x80\xae",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x93NUMPY",
    b"%!PS",
]
_VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    1.5,
    -7,
    10**19,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\0",
    "\u202e",
    "x" * 300,
    [],
    {},
    [[]],
    {"a": {}},
    [1, "x", None],
    [0] * 100,
]
_WIDTHS = ("<B", "<H", "<I", "<Q", ">I", ">Q")


def damaged(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """`data` changed once to four times; at times by a part of one of `others`."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_MUTATIONS)(data, rng, others)
    return data


def _flip(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if found:
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _byte(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    found = bytearray(data)
    if found:
        found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def _cut(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice((rng.randbytes(rng.choice((1, 4, 100))), rng.choice(_WORDS))) + data[at:]


def _remove(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 4, 64, 1000)) :]


def _run(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 8, 512, 4096))
    return data[:at] + rng.choice((b"\0", b"\xff"))[:1] * min(length, len(data) - at) + data[at + length :]


def _splice(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice((data, *others))
    start, at = rng.randrange(len(other) + 1), rng.randrange(len(data) + 1)
    part = other[start : start + rng.choice((4, 64, 1024))]
    return data[:at] + part + data[at + rng.choice((0, len(part))) :]


def _number(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A whole number written over the bytes, as lengths, sizes and offsets are."""
    kind = rng.choice(_WIDTHS)
    size = struct.calcsize(kind)
    most = 2 ** (8 * size) - 1
    value = rng.choice(
        (0, 1, most, most // 2, most // 2 + 1, len(data), rng.randrange(most), 2 ** rng.randrange(8 * size))
    )
    at = rng.randrange(max(1, len(data) - size + 1))
    return data[:at] + struct.pack(kind, min(value, most)) + data[at + size :]


def _text_number(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    found = list(_NUMBER.finditer(data[:100_000]))
    if not found:
        return _flip(data, rng, others)
    at = rng.choice(found)
    return data[: at.start()] + rng.choice((*_NUMBERS, rng.choice(found)[0])) + data[at.end() :]


_Mutation = Callable[[bytes, random.Random, list[bytes]], bytes]
_MUTATIONS: tuple[_Mutation, ...] = (
    _flip,
    _flip,
    _byte,
    _cut,
    _insert,
    _remove,
    _run,
    _splice,
    _number,
    _text_number,
    _text_number,
)


def damaged_json(data: bytes, rng: random.Random) -> Any:
    """The document in `data` with one to three of its values replaced, removed or moved."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        _collect(document, places)
        if not places:
            return copy.deepcopy(rng.choice(_VALUES))
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.7:
            holder[key] = copy.deepcopy(rng.choice((*_VALUES, rng.choice(places)[0])))
        elif action < 0.85:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(("x", "../x", "", "\0", "a" * 300))] = holder.pop(key)
    return document


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            _collect(entry, places)
