"""Writing a results store: the one process that holds it adds rows, hands them out and records what came of them."""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from experiments.vtab.holder import Holder, StoreInUse, is_alive, read_holder, refuse, take_lock
from experiments.vtab.store import APPLICATION_ID, SCHEMA, VERSION, ResultsStore, check_format, damage_reported

#: A run that has taken so many workers down with it is a failure, not bad luck.
MOST_DEATHS = 3


class StoreWriter(ResultsStore):
    """A store that this process holds, made by :func:`held_store`; its states: :mod:`experiments.vtab.store`.

    Every method is one transaction, which fails with :class:`StoreInUse` if another process has taken the store over
    (this one was asleep for longer than the lease), and with an OSError (``ENOSPC``) if the disk is full.

    Attributes:
        taken_over: What a dead holder left: who it was, and how many running rows became pending again.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, holder: Holder) -> None:
        super().__init__(path)
        self._writes = connection
        self._holder = holder
        self.taken_over: tuple[Holder, int] | None = None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _written(self.path), damage_reported(self.path):
            self._writes.execute("BEGIN IMMEDIATE")
            try:
                holder = read_holder(self._writes)
                if holder is None or holder.token != self._holder.token:
                    raise refuse(self.path, holder)
                yield self._writes
                self._writes.execute("COMMIT")
            except BaseException:
                if self._writes.in_transaction:
                    self._writes.execute("ROLLBACK")
                raise

    def heartbeat(self) -> None:
        """Say that this process lives; due well within the lease."""
        with self._transaction() as connection:
            connection.execute("UPDATE holder SET heartbeat = ?", (time.time(),))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Add rows that are not there yet as pending; returns how many were new.

        A row has the columns run_id, experiment, model, task, group, method, phase, lr, rank, seed, protocol and
        settings. One that exists stays as it is.
        """
        names = ("run_id", "experiment", "model", "task", "group", "method", "phase", "lr", "rank", "seed", "protocol")
        columns = ", ".join(f'"{name}"' for name in names)
        with self._transaction() as connection:
            before = connection.total_changes
            for row in rows:
                values = (*(row[name] for name in names), json.dumps(row["settings"]))
                connection.execute(
                    f"INSERT INTO runs ({columns}, settings) VALUES ({', '.join('?' * len(values))}) "
                    "ON CONFLICT (run_id) DO NOTHING",
                    values,
                )
            return connection.total_changes - before

    def claim(self, run_id: str) -> bool:
        """Pending to running; False where the row is not pending (any more)."""
        with self._transaction() as connection:
            cursor = connection.execute(
                "UPDATE runs SET status = 'running', attempts = attempts + 1, started_at = ?, finished_at = NULL, "
                "error = NULL WHERE run_id = ? AND status = 'pending'",
                (time.time(), run_id),
            )
            return cursor.rowcount == 1

    def finish(self, run_id: str, metrics: Mapping[str, Any]) -> None:
        """Running to done, with everything the run found out."""
        loss = metrics.get("loss")
        with self._transaction() as connection:
            self._expect_one(
                connection.execute(
                    "UPDATE runs SET status = 'done', finished_at = ?, accuracy = ?, loss = ?, train_seconds = ?, "
                    "comparable = ?, metrics = ? WHERE run_id = ? AND status = 'running'",
                    (
                        time.time(),
                        metrics["accuracy"],
                        loss if loss is not None and math.isfinite(loss) else None,
                        metrics.get("train_seconds"),
                        bool(metrics.get("official_sizes", False)),
                        json.dumps(metrics),
                        run_id,
                    ),
                ),
                run_id,
            )

    def fail(self, run_id: str, error: str) -> None:
        """Running to failed, with the traceback."""
        with self._transaction() as connection:
            self._expect_one(
                connection.execute(
                    "UPDATE runs SET status = 'failed', finished_at = ?, error = ? "
                    "WHERE run_id = ? AND status = 'running'",
                    (time.time(), error, run_id),
                ),
                run_id,
            )

    def release(self, run_id: str, died: str | None = None) -> bool:
        """Running to pending again, because the run was ended from outside.

        Args:
            run_id: The row.
            died: How its worker process ended, where it did. After ``MOST_DEATHS`` of them the row is failed instead:
                the run itself is what kills them.

        Returns:
            Whether the row is pending now.
        """
        with self._transaction() as connection:
            if died is not None:
                connection.execute("UPDATE runs SET deaths = deaths + 1 WHERE run_id = ?", (run_id,))
            (deaths,) = connection.execute("SELECT deaths FROM runs WHERE run_id = ?", (run_id,)).fetchone()
            if died is not None and deaths >= MOST_DEATHS:
                error = f"{deaths} worker processes ended in this run, the last one thus: {died}"
                cursor = connection.execute(
                    "UPDATE runs SET status = 'failed', finished_at = ?, error = ? "
                    "WHERE run_id = ? AND status = 'running'",
                    (time.time(), error, run_id),
                )
            else:
                cursor = connection.execute(
                    "UPDATE runs SET status = 'pending', started_at = NULL WHERE run_id = ? AND status = 'running'",
                    (run_id,),
                )
            self._expect_one(cursor, run_id)
            return deaths < MOST_DEATHS or died is None

    def retry(self, run_ids: Iterable[str]) -> int:
        """Failed to pending, for those of `run_ids` that are; returns how many."""
        with self._transaction() as connection:
            return sum(
                connection.execute(
                    "UPDATE runs SET status = 'pending', deaths = 0, error = NULL, finished_at = NULL "
                    "WHERE run_id = ? AND status = 'failed'",
                    (run_id,),
                ).rowcount
                for run_id in run_ids
            )

    def supersede(self, experiment: str, task: str, method: str, current: Iterable[str]) -> None:
        """Of the final runs of a task and method, count only `current` from now on."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET superseded = 1 WHERE experiment = ? AND task = ? AND method = ? AND phase = 'final'",
                (experiment, task, method),
            )
            for run_id in current:
                connection.execute("UPDATE runs SET superseded = 0 WHERE run_id = ?", (run_id,))

    def _expect_one(self, cursor: sqlite3.Cursor, run_id: str) -> None:
        if cursor.rowcount != 1:
            raise RuntimeError(f"run {run_id} is not running in {self.path}")

    def _enter(self) -> None:
        self._writes.execute("BEGIN IMMEDIATE")
        try:
            before = read_holder(self._writes)
            if before is not None and is_alive(before):
                raise refuse(self.path, before)
            me = self._holder
            self._writes.execute("DELETE FROM holder")
            self._writes.execute(
                "INSERT INTO holder VALUES (1, ?, ?, ?, ?, ?, ?)",
                (me.token, me.host, me.pid, me.boot, me.since, me.heartbeat),
            )
            left = self._writes.execute(
                "UPDATE runs SET status = 'pending', started_at = NULL WHERE status = 'running'"
            )
            if before is not None:
                self.taken_over = (before, left.rowcount)
            self._writes.execute("COMMIT")
        except BaseException:
            if self._writes.in_transaction:
                self._writes.execute("ROLLBACK")
            raise

    def _leave(self) -> None:
        # on a full disk this fails, and does not matter here: the lock is what tells that nobody holds the store
        with suppress(sqlite3.Error):
            self._writes.execute("DELETE FROM holder WHERE token = ?", (self._holder.token,))


def refuse_if_held(path: str | Path) -> None:
    """Say at once, before anything that takes time, what :func:`held_store` would say now.

    Raises:
        StoreInUse: Another process holds the store.
    """
    file = Path(path)
    if file.is_file():
        lock = take_lock(file)
        if lock is None:
            raise refuse(file, _reported_holder(file))
        lock.release()


@contextmanager
def held_store(path: str | Path) -> Iterator[StoreWriter]:
    """Hold the store `path`, made first where there is none, for as long as the context lasts.

    Raises:
        StoreInUse: Another process holds it; says which and since when.
        InputError: The file is no results store, or is damaged.
        OSError: The disk is full, or the folder cannot be written.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(file)
    if lock is None:
        raise refuse(file, _reported_holder(file))
    try:
        with _written(file), damage_reported(file), closing(_opened(file)) as connection:
            writer = StoreWriter(file, connection, Holder.myself())
            writer._enter()
            try:
                yield writer
            finally:
                # whoever took it over keeps it: the token is theirs
                writer._leave()
    finally:
        lock.release()


def _opened(file: Path) -> sqlite3.Connection:
    """A connection for writing to a checked store of this version."""
    new = not file.exists() or file.stat().st_size == 0
    connection = sqlite3.connect(file, timeout=30.0, isolation_level=None)
    try:
        if new:
            # all of it or nothing: a process that ends in between leaves an empty database, which is new again
            script = (
                f"BEGIN EXCLUSIVE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; "
                f"PRAGMA user_version = {VERSION}; COMMIT;"
            )
            connection.executescript(script)
        check_format(connection, file)
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"malformed: {' '.join(verdict.split())}")
        # Readers and the writer do not wait for each other. A file system without shared memory stays with the
        # rollback journal, which is as safe.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _reported_holder(file: Path) -> Holder | None:
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
            return read_holder(connection)
    except sqlite3.Error:
        return None


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """A full disk as the OSError it is everywhere else."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "disk is full" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


__all__ = ["MOST_DEATHS", "StoreInUse", "StoreWriter", "held_store", "refuse_if_held"]
