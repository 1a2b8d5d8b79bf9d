from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.errors import InputError
from experiments.runner import holder as holding
from experiments.runner.holder import FolderInUse, held, read_holder, refuse_if_held


def _hold(path: str, is_held: Any) -> None:
    with held(Path(path)):
        is_held.set()
        time.sleep(600)


def test_a_second_process_is_refused_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_held = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), is_held))
    process.start()
    try:
        assert is_held.wait(60)
        with pytest.raises(FolderInUse) as refused, held(tmp_path):
            pass
        sentence = str(refused.value)
        assert sentence.startswith(f"{tmp_path} is in use by another process (process {process.pid} on ")
        assert f"since {time.strftime('%Y-%m-%d')}" in sentence
        assert len(sentence.splitlines()) == 1
        assert isinstance(refused.value, InputError)
        with pytest.raises(FolderInUse, match=f"process {process.pid} on"):
            refuse_if_held(tmp_path)
    finally:
        process.kill()
        process.join()
    refuse_if_held(tmp_path)
    with held(tmp_path) as hold:
        assert hold.taken_over is not None
        assert hold.taken_over.pid == process.pid
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"), held(tmp_path):
            pass
    assert read_holder(tmp_path) is None
    with held(tmp_path) as hold:
        assert hold.taken_over is None  # it left in order
        hold.check()


class _NoLock:
    def release(self) -> None:
        pass


def test_between_machines_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine has another boot id, and its lock may not be seen here."""
    now = time.time()
    with held(tmp_path) as hold:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(holding, "boot_id", lambda: "another machine")
            elsewhere.setattr(holding, "_take_lock", lambda _: _NoLock())
            elsewhere.setattr(holding.time, "time", lambda: now + holding.LEASE_SECONDS / 2)
            with pytest.raises(FolderInUse), held(tmp_path):
                pass
            elsewhere.setattr(holding.time, "time", lambda: now + holding.LEASE_SECONDS + 60)
            other = held(tmp_path)
            other.__enter__()
        # the first one wakes up: the folder is another's now, and stays so
        hold.heartbeat()
        with pytest.raises(FolderInUse, match="is in use by another process"):
            hold.check()
    found = read_holder(tmp_path)
    assert found is not None
    assert found.boot == "another machine"
    other.__exit__(None, None, None)


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "HEARTBEAT_SECONDS", 0.01)
    with held(tmp_path):
        first = read_holder(tmp_path)
        assert first is not None
        limit = time.monotonic() + 30
        while (found := read_holder(tmp_path)) is None or found.heartbeat == first.heartbeat:
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_an_illegible_holder_is_none(tmp_path: Path) -> None:
    (tmp_path / "holder.json").write_text("{")
    with held(tmp_path) as hold:
        assert hold.taken_over is None
