"""Reads wandb's offline files: records of wandb's own protobuf in the framing of LevelDB's log.

wandb 0.31 ships no reader of its own in Python. https://github.com/google/leveldb/blob/main/doc/log_format.md: blocks
of 32 KiB, each record a crc (4 bytes), a length (2), a kind (1: whole, 2: first, 3: middle, 4: last) and the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FILE_HEADER = 2**15, 7, 7


def records(file: Path) -> Iterator[Any]:
    """All records of a ``.wandb`` file, in order."""
    from wandb.proto import wandb_internal_pb2

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = _FILE_HEADER, b""
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # too short for a header: padding
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        place += _HEADER
        whole = data[place : place + length] if kind in (1, 2) else whole + data[place : place + length]
        place += length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)


def _items(updates: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in updates:
        *parents, last = item.nested_key or [item.key]
        inner = found
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(item.value_json)
    return found


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, one entry per call."""
    return [_items(r.history.item) for r in records(file) if r.WhichOneof("record_type") == "history"]


def config(file: Path) -> dict[str, Any]:
    """The hyper-parameters at the end."""
    found: dict[str, Any] = {}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        update = record.run.config.update if kind == "run" else record.config.update if kind == "config" else ()
        found |= _items(update)
    return found
