from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from experiments.vtab import holder as holding
from experiments.vtab.store import COLUMNS, ResultsStore
from experiments.vtab.store_writer import MOST_DEATHS, StoreInUse, StoreWriter, held_store


def row(run_id: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_id": run_id, "experiment": "e", "model": "m", "task": "kitti", "group": "structured", "method": "eva",
        "phase": "tune", "lr": 1e-3, "rank": 4, "seed": 0, "protocol": "paper", "settings": {"tau": 0.99},
    }  # fmt: skip
    return values | changes


METRICS = {"accuracy": 0.75, "loss": 1.5, "train_seconds": 2.0, "official_sizes": True, "ranks": {"a": 1}}


def statuses(path: Path) -> dict[str, str]:
    return {r["run_id"]: r["status"] for r in ResultsStore(path).rows(superseded=True)}


def test_a_rows_life(tmp_path: Path) -> None:
    path = tmp_path / "deep/results.sqlite"
    with held_store(path) as store:
        assert store.add([row("a"), row("b", rank=None, phase="final")]) == 2
        assert store.add([row("a", lr=5.0), row("c")]) == 1  # a row that exists stays as it is
        assert store.claim("a")
        assert not store.claim("a")
        assert not store.claim("nonsense")
        (running,) = ResultsStore(path).rows(run_id="a")  # readers need not wait for the writer
        assert (running["status"], running["attempts"], running["metrics"]) == ("running", 1, None)
        store.finish("a", METRICS)
        assert store.claim("b")
        store.fail("b", "Traceback\nValueError: no")
        with pytest.raises(RuntimeError, match="b is not running"):
            store.finish("b", METRICS)
        assert not store.claim("b")
        with pytest.raises(RuntimeError, match="a is not running"):
            store.fail("a", "late")
    (a,) = ResultsStore(path).rows(run_id="a")
    assert tuple(a) == COLUMNS
    assert (a["accuracy"], a["loss"], a["train_seconds"], a["comparable"], a["lr"]) == (0.75, 1.5, 2.0, True, 1e-3)
    assert (a["metrics"], a["settings"], a["error"]) == (METRICS, {"tau": 0.99}, None)
    (b,) = ResultsStore(path).rows(rank=None)
    assert (b["status"], b["error"], b["accuracy"]) == ("failed", "Traceback\nValueError: no", None)
    with held_store(path) as store:
        assert store.retry(["a", "b", "c"]) == 1  # only what failed
        assert store.claim("b")
        assert store.release("b")
    assert statuses(path) == {"a": "done", "b": "pending", "c": "pending"}
    assert [r["run_id"] for r in ResultsStore(path).rows(phase="tune", details=False)] == ["a", "c"]
    with pytest.raises(ValueError, match="unknown column 'metod': did you mean method"):
        ResultsStore(path).rows(metod="eva")


def test_a_loss_that_is_no_number_is_an_empty_cell(tmp_path: Path) -> None:
    with held_store(tmp_path / "s") as store:
        store.add([row("a")])
        store.claim("a")
        store.finish("a", METRICS | {"loss": float("nan")})
        assert store.rows()[0]["loss"] is None


def test_a_run_that_kills_its_workers_is_failed_in_the_end(tmp_path: Path) -> None:
    with held_store(tmp_path / "s") as store:
        store.add([row("a")])
        for death in range(1, MOST_DEATHS + 1):
            assert store.claim("a")
            assert store.release("a", died="killed by signal 9") == (death < MOST_DEATHS)
        (a,) = store.rows()
        assert (a["status"], a["deaths"], a["attempts"]) == ("failed", MOST_DEATHS, MOST_DEATHS)
        assert a["error"] == "3 worker processes ended in this run, the last one thus: killed by signal 9"
        assert store.retry(["a"]) == 1
        assert store.rows()[0]["deaths"] == 0
        for _ in range(2 * MOST_DEATHS):  # being ended from outside is nobody's fault
            assert store.claim("a")
            assert store.release("a")


def test_final_runs_of_an_earlier_choice_are_superseded(tmp_path: Path) -> None:
    with held_store(tmp_path / "s") as store:
        store.add([row("old", phase="final"), row("other", phase="final", method="lora"), row("tune")])
        store.supersede("e", "kitti", "eva", ["old"])
        store.add([row("new", phase="final", rank=8)])
        store.supersede("e", "kitti", "eva", ["new"])
        assert [r["run_id"] for r in store.rows()] == ["other", "tune", "new"]
        assert [r["run_id"] for r in store.rows(superseded=True)] == ["old", "other", "tune", "new"]
        store.supersede("e", "kitti", "eva", ["old"])
        assert [r["run_id"] for r in store.rows(phase="final")] == ["old", "other"]


def _hold(path: str, held: Any) -> None:
    with held_store(path) as store:
        store.add([row("a"), row("b")])
        store.claim("a")
        held.set()
        time.sleep(600)


def test_second_sweep_is_refused_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(str(path), held))
    process.start()
    try:
        assert held.wait(30)
        with pytest.raises(StoreInUse) as refused, held_store(path):
            pass
        sentence = str(refused.value)
        assert sentence.startswith(f"results store {path} is in use by another sweep (process {process.pid} on ")
        assert f"since {time.strftime('%Y-%m-%d')}" in sentence
        assert len(sentence.splitlines()) == 1
        assert statuses(path) == {"a": "running", "b": "pending"}
    finally:
        process.kill()
        process.join()
    with held_store(path) as store:
        assert store.taken_over is not None
        holder, rows = store.taken_over
        assert (holder.pid, rows) == (process.pid, 1)
        assert statuses(path) == {"a": "pending", "b": "pending"}
        with pytest.raises(StoreInUse, match=f"process {os.getpid()} on"), held_store(path):
            pass
    with held_store(path) as store:
        assert store.taken_over is None  # it left in order


def test_between_machines_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine has another boot id, and its lock may not be seen here."""
    path = tmp_path / "results.sqlite"
    now = time.time()
    with held_store(path) as store:
        store.add([row("a")])
        store.claim("a")
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(holding, "boot_id", lambda: "another machine")
            _try_elsewhere(path, now + holding.LEASE_SECONDS / 2, elsewhere, refused=True)
            _try_elsewhere(path, now + holding.LEASE_SECONDS + 60, elsewhere, refused=False)
        # the first one wakes up: its rows are another's now
        for write in (store.heartbeat, lambda: store.claim("a"), lambda: store.fail("a", "late")):
            with pytest.raises(StoreInUse, match="is in use by another sweep"):
                write()
        assert statuses(path) == {"a": "pending"}


class _NoLock:
    def release(self) -> None:
        pass


def _try_elsewhere(path: Path, clock: float, patch: pytest.MonkeyPatch, refused: bool) -> None:
    patch.setattr("experiments.vtab.store_writer.take_lock", lambda _: _NoLock())
    patch.setattr(holding.time, "time", lambda: clock)
    if refused:
        with pytest.raises(StoreInUse), held_store(path):
            pass
    else:
        context = held_store(path)
        context.__enter__()  # and stays


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no results store .*none\.sqlite: the sweep command makes it"):
        ResultsStore(tmp_path / "none.sqlite")
    foreign = tmp_path / "foreign.sqlite"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    version = tmp_path / "version.sqlite"
    with held_store(version):
        pass
    with sqlite3.connect(version) as connection:
        connection.execute("PRAGMA user_version = 99")
    text = tmp_path / "text.sqlite"
    text.write_text("not a database at all, but long enough to have a header" * 100)
    for path, message in (
        (foreign, "is a database, but not a results store: name another file"),
        (version, "has version 99, this program reads version 1"),
        (text, r"is damaged \(file is not a database\): put a copy in its place, or move it away"),
    ):
        with pytest.raises(ValueError, match=message):
            ResultsStore(path)
        with pytest.raises(ValueError, match=message), held_store(path):
            pass


def test_damaged_store_is_recognised_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    with held_store(path) as store:
        store.add(row(f"run{i}", settings={"long": "x" * 500}) for i in range(200))
    data = bytearray(path.read_bytes())
    data[8192 : 8192 + 20000] = b"\x55" * 20000
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged \(.*malformed.*\): put a copy in its place"), held_store(path):
        pass
    assert path.read_bytes() == bytes(data)


def test_process_killed_while_making_the_store_leaves_one_that_can_be_made(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    path.touch()
    with held_store(path) as store:
        assert store.add([row("a")]) == 1


def test_full_disk_is_said_as_such_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    with held_store(path) as store:
        store.add([row("a"), row("b")])
        store.claim("a")
        # SQLite's own error of a full disk
        (pages,) = store._writes.execute("PRAGMA page_count").fetchone()
        store._writes.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError) as full:
            store.finish("a", METRICS | {"large": "x" * 100_000})
        assert full.value.errno == errno.ENOSPC
        assert statuses(path) == {"a": "running", "b": "pending"}
    with held_store(path) as store:
        assert statuses(path) == {"a": "pending", "b": "pending"}
        assert store.claim("a")
        store.finish("a", METRICS)


def _write_for_ever(path: str, started: Any) -> None:
    with held_store(path) as store:
        store.add(row(f"run{i}") for i in range(2000))
        started.set()
        for i in range(2000):
            store.claim(f"run{i}")
            store.finish(f"run{i}", METRICS | {"accuracy": i / 2000})


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.2])
def test_killed_in_the_middle_of_writing_rows_are_whole(tmp_path: Path, moment: float) -> None:
    path = tmp_path / "results.sqlite"
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_write_for_ever, args=(str(path), started))
    process.start()
    assert started.wait(60)
    time.sleep(moment)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with held_store(path) as store:
        rows = store.rows()
        assert len(rows) == 2000
        done = [r for r in rows if r["status"] == "done"]
        assert {r["status"] for r in rows} <= {"done", "pending"}
        assert all(r["metrics"]["accuracy"] == r["accuracy"] == int(r["run_id"][3:]) / 2000 for r in done)
        # in the order of claims, without a gap
        assert [r["run_id"] for r in done] == [f"run{i}" for i in range(len(done))]


def test_writer_is_a_reader(tmp_path: Path) -> None:
    with held_store(tmp_path / "s") as store:
        assert isinstance(store, StoreWriter)
        assert isinstance(store, ResultsStore)
        store.heartbeat()
