"""Damaged files over all readers: the same ones for every change, new ones every night.

By hand for longer: ``python -m tests.fuzz --seconds 3600 --seed 1``.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_lightning.errors import InputError
from tests.fuzz.engine import Reader, fuzz, same
from tests.fuzz.mutations import damaged
from tests.fuzz.readers import READERS

#: Damaged files of each reader for every change, and the seconds after which a slow reader has had enough.
INPUTS, MOST_SECONDS = 200, 10.0
#: For each reader at night.
NIGHTLY_SECONDS = 30.0


@pytest.mark.slow  # thousands of damaged files
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_load_as_written_or_are_refused(reader: Reader) -> None:
    report = fuzz(reader, MOST_SECONDS, seed=0, most=INPUTS)
    assert report.inputs > 3
    assert not report.findings


@pytest.mark.nightly  # a finding of new inputs says nothing about the change that happened to meet it
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_new_damaged_files_load_as_written_or_are_refused(reader: Reader) -> None:
    report = fuzz(reader, NIGHTLY_SECONDS, seed=random.SystemRandom().randrange(2**32))
    assert not report.findings


def test_the_judge_sees_what_is_wrong(tmp_path: Path) -> None:
    """A reader with every fault that is looked for."""

    def read(folder: Path) -> bytes:
        content = (folder / "a").read_bytes()
        if len(content) < 40:
            raise KeyError("short")
        if content[0] != 0:
            raise InputError("refused")
        return content

    report = fuzz(
        Reader("bad", lambda folder: (folder / "a").write_bytes(bytes(80)) and None, read), 30, 0, tmp_path, 300
    )
    kinds = " ".join(report.kinds)
    assert "silently different" in kinds
    assert "KeyError at test_fuzz.py" in kinds
    assert report.refused > 0
    saved = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert any(len(content) == 0 for content in saved.values()), "the shortest input that is a KeyError has no byte"


def test_memory_is_seen() -> None:
    def read(folder: Path) -> None:
        try:
            np.empty(2**50, dtype=np.uint8) if (folder / "a").read_bytes() != bytes(80) else None
        except MemoryError as error:
            raise InputError("damaged") from error

    report = fuzz(Reader("large", lambda folder: (folder / "a").write_bytes(bytes(80)) and None, read), 30, 0, most=20)
    assert set(report.kinds) == {"asks for too much memory"}


def test_equality_is_to_the_bit() -> None:
    assert same({"a": [np.arange(3), float("nan")]}, {"a": [np.arange(3), float("nan")]})
    assert not same(1, 1.0)
    assert not same(1, True)
    assert not same(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert not same([1], [1, 2])
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})


def test_inputs_repeat_by_seed() -> None:
    def all_of(seed: int) -> list[bytes]:
        return [damaged(bytes(range(200)), random.Random(f"{seed} {i}"), [b"other" * 20]) for i in range(50)]

    assert all_of(1) == all_of(1) != all_of(2)
