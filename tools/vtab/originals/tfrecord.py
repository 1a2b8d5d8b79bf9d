"""Reading TFRecord files of ``tf.train.Example`` messages without TensorFlow: as much of both formats as DMLab uses.

A record is its length (8 bytes, little-endian), 4 bytes of checksum, its data, and 4 bytes of checksum. An Example is a
protocol buffer: a map from names to lists of bytes, floats or whole numbers. Both checksums are compared.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

from eva_lightning.errors import InputError
from tools.vtab.originals.crc32c import crc32c

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def record_spans(stream: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Start and length of the data of every record. The stream may be moved in between.

    Raises:
        InputError: The file ends within a record, or the length of one is not as it was written.
    """
    size = stream.seek(0, 2)
    position = 0
    while position < size:
        stream.seek(position)
        header = stream.read(12)
        length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
        if position + 16 + length > size:
            raise InputError(f"{_name(stream)} ends within a record: download it again")
        _compare(stream, header[:8], header[8:])
        yield position + 12, length
        position += 16 + length


def record(stream: IO[bytes], start: int, length: int) -> bytes:
    """The data of a record.

    Raises:
        InputError: It is not as it was written.
    """
    stream.seek(start)
    data = stream.read(length)
    _compare(stream, data, stream.read(4))
    return data


def _compare(stream: IO[bytes], data: bytes, checksum: bytes) -> None:
    found = crc32c(data)
    masked = (((found >> 15) | (found << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    if checksum != masked.to_bytes(4, "little"):
        raise InputError(f"{_name(stream)} is damaged (the checksum of a record differs): download it again")


def _name(stream: IO[bytes]) -> str:
    return str(getattr(stream, "name", "the file"))


def parse_example(data: bytes) -> dict[str, list[bytes | int]]:
    """Feature name -> its values, of the kinds bytes and whole number.

    Raises:
        InputError: The data is no such message.
    """
    found: dict[str, list[bytes | int]] = {}
    for features in _fields(data, 1):
        for entry in _fields(features, 1):
            name = next(_fields(entry, 1), b"").decode(errors="replace")
            found[name] = [value for feature in _fields(entry, 2) for value in _values(feature)]
    return found


def _values(feature: bytes) -> Iterator[bytes | int]:
    for number, content in _messages(feature):
        if not isinstance(content, bytes):
            raise InputError("not a tf.train.Example: a number in the place of a feature")
        if number == 1:
            yield from _fields(content, 1)
        elif number == 3:
            for _, item in _messages(content):
                if isinstance(item, int):
                    yield item
                else:  # packed
                    position = 0
                    while position < len(item):
                        value, position = _varint(item, position)
                        yield value


def _fields(message: bytes, number: int) -> Iterator[bytes]:
    return (content for found, content in _messages(message) if found == number and isinstance(content, bytes))


def _messages(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Field number and content of each field of a protocol buffer message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise InputError(f"not a tf.train.Example: field of kind {kind}")
        if position + length > len(message):
            raise InputError("not a tf.train.Example: it ends within a field")
        yield number, message[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise InputError("not a tf.train.Example: a whole number has no end")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
