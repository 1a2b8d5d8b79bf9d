"""Checksums inside files: every damage is found, stock readers do not mind them."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eva_lightning.checkpoint_io import save_sealed
from eva_lightning.errors import DamagedFileError
from eva_lightning.files import with_numbers
from eva_lightning.sealed import damage, previous, read_sealed_json, set_aside, whole_checkpoint, write_sealed_json
from eva_lightning.tensor_files import are_whole, read_tensors, write_tensors

CONTENT = {"state_dict": {"a": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.bfloat16)}, "epoch": 3, "about": {}}


def flipped(content: bytes, places: list[int], seed: int = 0) -> bytes:
    draw, changed = random.Random(seed), bytearray(content)
    for place in places:
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_stock_readers_do_not_see_the_checksum(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    save_sealed(CONTENT, file)
    for mmap in (False, True):
        loaded = torch.load(file, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["a"], CONTENT["state_dict"]["a"])  # type: ignore[index]
    assert zipfile.ZipFile(file).testzip() is None
    assert damage(file) is None


@pytest.mark.parametrize("ours", [True, False])
def test_every_flipped_byte_and_every_cut_of_a_checkpoint_is_found(tmp_path: Path, ours: bool) -> None:
    file = tmp_path / "last.ckpt"
    save_sealed(CONTENT, file) if ours else torch.save(CONTENT, file)
    assert damage(file) is None
    whole, draw = file.read_bytes(), random.Random(0)
    # of another's, padding between tensors has no CRC and no meaning
    data = whole.find(CONTENT["state_dict"]["a"].numpy().tobytes())  # type: ignore[index]
    least, most = (0, len(whole)) if ours else (data, data + 20_000)
    for seed in range(300):
        place = len(whole) - 1 - seed if ours and seed < 100 else draw.randrange(least, most)
        file.write_bytes(flipped(whole, [place], seed))
        assert damage(file) is not None, place - len(whole)
    for length in (0, 1, 20_000, len(whole) - 130, len(whole) - 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        reason = damage(file)
        # without its comment, what is left of ours is the whole archive
        assert reason is not None or (ours and torch.load(file)["epoch"] == 3)


@pytest.mark.parametrize("content", [b"no checkpoint", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02}q\x00."])
def test_what_is_no_archive_is_damage(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "last.ckpt"
    file.write_bytes(content)
    assert damage(file) is not None


def test_a_compressed_archive_is_none_of_torch(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert damage(file) is not None


def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "last.ckpt"
    assert whole_checkpoint(file) is None
    save_sealed(CONTENT, file)
    save_sealed(CONTENT, previous(file))
    assert whole_checkpoint(file) == file
    bad = flipped(file.read_bytes(), [700, 800, 900, 1000])
    file.write_bytes(bad)
    assert whole_checkpoint(file) == previous(file)
    assert (tmp_path / "last.ckpt.damaged").read_bytes() == bad
    assert caplog.messages[-1].endswith("set aside as last.ckpt.damaged, going back to the checkpoint before it")
    previous(file).write_bytes(b"")
    assert whole_checkpoint(file) is None
    assert "(it is empty): set aside as last.ckpt.previous.damaged, starting again" in caplog.messages[-1]
    file.write_bytes(b"x")
    assert whole_checkpoint(file) is None
    assert (tmp_path / "last.ckpt.damaged-2").read_bytes() == b"x"


def test_a_file_that_cannot_be_set_aside_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not set_aside(tmp_path / "gone", "gone is damaged", "starting again").exists()
    assert "gone is damaged: not set aside (no such file or directory), starting again" in caplog.text


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"a": 1, "b": [1.5, None, "ü"]},
        {"nested": {"x": (1, 2)}, "huge": 10**30},
        {"nan": float("nan"), "1": 1e-300},
    ],
)
def test_json_documents_come_back(tmp_path: Path, document: dict[str, Any]) -> None:
    file = tmp_path / "metrics.json"
    write_sealed_json(file, document)
    assert json.dumps(with_numbers(read_sealed_json(file))) == json.dumps(document)


def test_every_changed_character_of_a_json_document_is_found(tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    document = {"accuracy": 0.125, "ranks": {"a": 3, "b": 4}, "name": "first"}
    write_sealed_json(file, document)
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 1, 2, 5):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                assert read_sealed_json(file) == document  # white space
            except DamagedFileError as error:
                assert "metrics.json is damaged" in str(error)  # noqa: PT017
        if place < len(whole) - 1:
            file.write_bytes(whole[:place])
            with pytest.raises(DamagedFileError):
                read_sealed_json(file)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"3", b"9" * 5000, b"{]"])
def test_what_is_no_document_is_damage(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "metrics.json"
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"metrics\.json is damaged"):
        read_sealed_json(file)


def test_tensor_files_come_back_and_stock_safetensors_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    tensors = {
        "a": torch.randn(3, 4).T, "b": torch.tensor(2.5), "c": torch.zeros(0, 3),
        "d": torch.ones(2, dtype=torch.bfloat16), "e": torch.tensor([True, False]), "f": torch.arange(4),
    }  # fmt: skip
    write_tensors(file, tensors, "a document")
    found, document = read_tensors(file)
    assert document == "a document"
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(load_file(file)[name], tensor)
    save_file({"x": torch.ones(2)}, file)
    assert read_tensors(file)[1] is None


def test_damage_to_a_tensor_file_is_found(tmp_path: Path) -> None:
    file, tensors = tmp_path / "w.safetensors", {"a": torch.randn(40), "b": torch.randn(7)}
    write_tensors(file, tensors, "document")
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(flipped(whole, [place], place))
        try:
            found, document = read_tensors(file)
        except DamagedFileError:
            continue
        # white space, or the name of what is not ours
        assert document == "document"
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert not are_whole(tmp_path / "none")
    file.write_bytes(whole[:-1])
    assert not are_whole(file)
    assert not file.exists()
