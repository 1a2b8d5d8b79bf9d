"""The results store: every run of every sweep as one row of one SQLite file, written by one process at a time.

A row's life::

              add              claim               finish
    (nothing) ----> pending ---------> running --------------> done
                     ^   ^               |  |
                     |   +--- release ---+  +----- fail -----> failed
                     +-------------------- retry ----------------+

- Only the process that *holds* the store (:func:`~experiments.vtab.store_writer.held_store`) writes. A second one is
  refused while the first lives; a dead holder is recognised and replaced, and its running rows become pending again,
  because nobody is left who could report them.
- ``claim`` is one conditional update (``... WHERE status = 'pending'``) in a transaction that first makes sure the
  process still holds the store, so that a row is never handed out twice.
- A run's figures arrive in one transaction, together with its status: a row is done with all of them, or not at all.
- ``done`` is final. ``run_id`` is a digest of the settings that make the result, so a run of the same settings is the
  same row, whichever sweep asks for it, and different models, protocols and grids live in one store side by side.

Reading needs no permission and disturbs nobody (WAL mode).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from eva_lightning.errors import InputError, MissingInputError, unknown

Status = Literal["pending", "running", "done", "failed"]
Phase = Literal["tune", "final"]

#: "EVAV", in the header of the file: tells a results store from other people's databases.
APPLICATION_ID = 0x45564156
VERSION = 1

SCHEMA = """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY,
    experiment TEXT NOT NULL,
    model TEXT NOT NULL,
    task TEXT NOT NULL,
    "group" TEXT NOT NULL,
    method TEXT NOT NULL,
    phase TEXT NOT NULL CHECK (phase IN ('tune', 'final')),
    lr REAL NOT NULL,
    rank INTEGER,
    seed INTEGER NOT NULL,
    protocol TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    started_at REAL,
    finished_at REAL,
    accuracy REAL,
    loss REAL,
    train_seconds REAL,
    comparable INTEGER,
    superseded INTEGER NOT NULL DEFAULT 0,
    metrics TEXT,
    error TEXT,
    settings TEXT NOT NULL,
    CHECK (status != 'done' OR (accuracy IS NOT NULL AND metrics IS NOT NULL)),
    CHECK (status != 'failed' OR error IS NOT NULL)
);
CREATE INDEX by_place ON runs (experiment, task, method, phase, status);
CREATE TABLE holder (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    token TEXT NOT NULL,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    boot TEXT NOT NULL,
    since REAL NOT NULL,
    heartbeat REAL NOT NULL
);
"""

#: Columns of a row, as :meth:`ResultsStore.rows` gives them.
COLUMNS = (
    "run_id", "experiment", "model", "task", "group", "method", "phase", "lr", "rank", "seed", "protocol", "status",
    "attempts", "deaths", "started_at", "finished_at", "accuracy", "loss", "train_seconds", "comparable", "superseded",
    "metrics", "error", "settings",
)  # fmt: skip
_LARGE = ("metrics", "settings")


class ResultsStore:
    """The rows of a results store, for reading; also while a sweep writes them.

    Args:
        path: The SQLite file.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no results store, is damaged, or was written by another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._connection() as connection:
            check_format(connection, self.path)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise MissingInputError(f"there is no results store {self.path}: the sweep command makes it")
        with damage_reported(self.path):
            address = f"{self.path.resolve().as_uri()}?mode=ro"
            with closing(sqlite3.connect(address, uri=True, timeout=30.0)) as connection:
                yield connection

    def rows(self, *, superseded: bool = False, details: bool = True, **equals: Any) -> list[dict[str, Any]]:
        """Rows whose columns equal the values given, in the order they were added: ``rows(phase="final")``.

        Args:
            superseded: Also final runs of a learning rate and rank that a larger grid has since replaced.
            details: Parse ``metrics`` and ``settings``, too; False leaves these two out.
            equals: Column and value; None matches empty ones (the rank of methods without).

        Returns:
            One mapping per row with the keys :data:`COLUMNS`: ``metrics`` (None until done) and ``settings`` are
            mappings, ``comparable`` (None until done) and ``superseded`` are bools; ``rank`` is None for methods
            without one; ``accuracy`` is in [0, 1], of val200 in phase ``"tune"`` and of test in phase ``"final"``;
            times are seconds.

        Raises:
            InputError: No such column, or a damaged store.
        """
        for column in equals:
            if column not in COLUMNS:
                raise InputError(unknown("column", column, COLUMNS))
        conditions = [f'"{column}" IS ?' for column in equals]
        if not superseded and "superseded" not in equals:
            conditions.append("superseded = 0")
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        columns = [column for column in COLUMNS if details or column not in _LARGE]
        names = ", ".join(f'"{column}"' for column in columns)
        with self._connection() as connection:
            found = connection.execute(f"SELECT {names} FROM runs{where} ORDER BY rowid", tuple(equals.values()))
            return [_parsed(dict(zip(columns, values, strict=True))) for values in found]


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    for column in _LARGE:
        if row.get(column) is not None:
            row[column] = json.loads(row[column])
    for column in ("comparable", "superseded"):
        row[column] = None if row[column] is None else bool(row[column])
    return row


def check_format(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that the file is a results store of this version.

    Raises:
        InputError: It is not.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID:
        raise InputError(f"{path} is a database, but not a results store: name another file")
    if version != VERSION:
        raise InputError(f"results store {path} has version {version}, this program reads version {VERSION}")


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about a file it cannot read into one sentence."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        reason = str(error)
        if any(words in reason for words in ("not a database", "malformed", "no such table", "no such column")):
            raise InputError(
                f"results store {path} is damaged ({reason}): put a copy in its place, or move it away to start anew"
            ) from error
        if any(words in reason for words in ("unable to open", "readonly")):
            raise InputError(f"results store {path} cannot be opened ({reason}): check its folder's permissions") from (
                error
            )
        raise
