"""Checkpoints written all or nothing: kills, full disks, damage, and Lightning's own use of them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from eva_lightning import AtomicCheckpointIO
from eva_lightning.errors import DamagedFileError, DiskFullError, UnwritableError
from eva_lightning.files import is_temporary
from eva_lightning.sealed import damage, previous, whole_checkpoint


def trainer(folder: Path, epochs: int) -> L.Trainer:
    checkpoints = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    return L.Trainer(
        max_epochs=epochs,
        limit_train_batches=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[checkpoints],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def flip(file: Path) -> None:
    """Change four bytes in the middle of a file."""
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 4):
        content[place] ^= 0xFF
    file.write_bytes(content)


def test_lightning_keeps_two_checkpoints_and_resumes_from_either(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    module, start = BoringModel(), None
    start = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, 3).fit(module)
    last = tmp_path / "last.ckpt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.previous"]
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert torch.load(previous(last), weights_only=True)["epoch"] == 1
    stock = BoringModel.load_from_checkpoint(last)
    assert torch.equal(stock.layer.weight, module.layer.weight)

    flip(last)
    again = BoringModel()
    again.load_state_dict(start)
    with pytest.raises(DamagedFileError, match=r"last\.ckpt is damaged \(.*\): resume from last\.ckpt\.previous"):
        trainer(tmp_path, 3).fit(again, ckpt_path=last)
    resume = whole_checkpoint(last)
    assert resume == previous(last)
    trainer(tmp_path, 3).fit(again, ckpt_path=resume)
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert damage(last) is None


def test_lightnings_last_is_the_newest_whole_name(tmp_path: Path) -> None:
    """``ckpt_path="last"`` takes the newest file that is called like it."""
    callback = ModelCheckpoint(tmp_path, save_last=True, enable_version_counter=False)
    io = AtomicCheckpointIO()
    for number in range(2):
        io.save_checkpoint({"n": number}, tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt.damaged").touch()
    found = callback._find_last_checkpoints(trainer(tmp_path, 1))
    assert found == {str(tmp_path / "last.ckpt")}


def test_removing_a_checkpoint_removes_the_one_before(tmp_path: Path) -> None:
    io, file = AtomicCheckpointIO(), tmp_path / "a" / "last.ckpt"
    for number in range(3):
        io.save_checkpoint({"n": number}, file)
        assert io.load_checkpoint(file)["n"] == number
    assert torch.load(previous(file))["n"] == 1
    io.remove_checkpoint(file)
    assert list(file.parent.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        io.load_checkpoint(file)


def test_only_one_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    io = AtomicCheckpointIO(keep_previous=False)
    for number in range(2):
        io.save_checkpoint({"n": number}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_options_of_a_storage_are_refused_as_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})
    AtomicCheckpointIO().save_checkpoint({"n": 1}, "memory://checkpoints/x.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://checkpoints/x.ckpt")["n"] == 1


def test_two_are_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(3):
        AtomicCheckpointIO().save_checkpoint({"n": number}, tmp_path / "last.ckpt")
    assert [torch.load(file)["n"] for file in (tmp_path / "last.ckpt", tmp_path / "last.ckpt.previous")] == [2, 1]
    assert len(list(tmp_path.iterdir())) == 2


def _save_for_ever(file: Path) -> None:
    for number in itertools.count():
        AtomicCheckpointIO().save_checkpoint({"n": number, "w": torch.full((100_000,), float(number))}, file)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_25_kills_while_saving_leave_two_whole_checkpoints(tmp_path: Path) -> None:
    delays, file = random.Random(1), tmp_path / "last.ckpt"
    for _ in range(25):
        process = os.fork()
        if process == 0:
            try:
                _save_for_ever(file)
            finally:
                os._exit(1)
        deadline = time.monotonic() + 30
        while not previous(file).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delays.uniform(0.01, 0.15))
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        for each in (file, previous(file)):
            assert damage(each) is None
            content = torch.load(each, weights_only=True)
            assert torch.equal(content["w"], torch.full((100_000,), float(content["n"])))
    assert sum(map(is_temporary, tmp_path.iterdir())) <= 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_checkpoint_and_says_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"n": 1}, file)
    before = file.read_bytes()

    def on_full_disk(folder: Path, suffix: str) -> str:
        (folder / f"full{suffix}").symlink_to("/dev/full")
        return str(folder / f"full{suffix}")

    monkeypatch.setattr("eva_lightning.files._new_file", on_full_disk)
    for size in (1, 10**6):
        with pytest.raises(DiskFullError, match="make room"):
            io.save_checkpoint({"n": torch.zeros(size)}, file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_limit_on_files_leaves_the_old_checkpoint_and_says_why(tmp_path: Path) -> None:
    import resource

    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"n": 1}, file)
    process = os.fork()
    if process == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            io.save_checkpoint({"n": torch.zeros(10**6)}, file)
        except UnwritableError as error:
            status = 0 if "last.ckpt: file too large" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert torch.load(file)["n"] == 1
