"""Files of strangers in torch's format: no code runs, and none takes more memory than it has bytes."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from eva_lightning.errors import InputError
from eva_lightning.plain_checkpoint import write_plain_checkpoint
from eva_lightning.rl.module import DecisionTransformerModule, read_checkpoint
from eva_lightning.torch_files import load_plain
from eva_lightning.vision.backbone.weight_files import read_weights


class _Large:
    def __reduce__(self) -> tuple[object, tuple[int]]:
        return bytearray, (2**45,)


def _archive(file: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
    return file


def test_byte_arrays_of_any_size_are_not_made(tmp_path: Path) -> None:
    file = _archive(tmp_path / "a.pth", pickle.dumps({"state_dict": _Large()}, 2))
    with pytest.raises((pickle.UnpicklingError, MemoryError)):  # torch makes them: 2**45 bytes are too many
        torch.load(file, weights_only=True)
    for read in (load_plain, read_weights, read_checkpoint):
        with pytest.raises(InputError, match="makes byte arrays of any size"):
            read(file)
    with pytest.raises(InputError, match="makes byte arrays of any size"):
        write_plain_checkpoint(DecisionTransformerModule, file, tmp_path / "b.pth")


def test_packed_archives_are_not_unpacked(tmp_path: Path) -> None:
    content = pickle.dumps({"a": "x" * 1_000_000}, 2)
    with pytest.raises(InputError, match="has packed parts or folders, which torch"):
        load_plain(_archive(tmp_path / "a.pth", content, zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match=r"a\.pth is damaged"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_torch_load(tmp_path: Path, new_format: bool) -> None:
    content: dict[str, Any] = {"a": torch.arange(3), "n": 3}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    found = load_plain(tmp_path / "a.pth")
    assert torch.equal(found["a"], content["a"])
    assert found["n"] == 3


def test_parts_marked_as_folders_are_refused(tmp_path: Path) -> None:
    """torch gives such a tensor the content of memory that nobody has written."""
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        at = archive.start_dir
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[at + 38] |= 0x10
    (tmp_path / "a.pth").write_bytes(data)
    for read in (load_plain, read_weights):
        with pytest.raises(InputError):
            read(tmp_path / "a.pth")
