"""Who may write a results store: one process, told from a dead one for certain on one machine, by a lease elsewhere.

Two means together. A lock on ``<store>.lock`` ends with the process that holds it, however it ends, so on one machine
(one kernel: also between containers that share the folder) a free lock means a dead holder. Machines that share a
folder do not all share such locks; between them a heartbeat in the store decides: who has not been heard of for
``LEASE_SECONDS`` is taken for dead. One that was only asleep finds its token replaced and stops.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import time
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

#: Without a heartbeat for so long, a holder on another machine counts as dead.
LEASE_SECONDS = 120.0


class StoreInUse(ValueError):
    """Another sweep holds the store."""


@dataclass(frozen=True)
class Holder:
    """A process that holds, or wants to hold, a store: `boot` tells machines apart, `token` processes."""

    token: str
    host: str
    pid: int
    boot: str
    since: float
    heartbeat: float

    @classmethod
    def myself(cls) -> Holder:
        """This process."""
        now = time.time()
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), boot_id(), now, now)

    @property
    def text(self) -> str:
        """Who and since when, for an error message."""
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, since {since}"


def boot_id() -> str:
    """Something that is the same in all processes of this machine until it restarts."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text(encoding="ascii").strip() if file.is_file() else socket.gethostname()


def read_holder(connection: sqlite3.Connection) -> Holder | None:
    """Whoever the store says holds it."""
    row = connection.execute("SELECT token, host, pid, boot, since, heartbeat FROM holder").fetchone()
    return None if row is None else Holder(*row)


def refuse(path: Path, holder: Holder | None) -> StoreInUse:
    """The one sentence for whoever comes second."""
    who = "" if holder is None else f" ({holder.text})"
    return StoreInUse(
        f"results store {path} is in use by another sweep{who}: wait for it, end it, or choose another --output"
    )


def take_lock(path: Path) -> FileLock | None:
    """The lock that goes with the store `path`, or None where another process has it.

    Where the file system knows no locks, the heartbeat alone decides.
    """
    lock = FileLock(path.with_name(path.name + ".lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    except NotImplementedError:
        pass
    return lock


def is_alive(holder: Holder) -> bool:
    """Whether `holder` may still write, given that this process has got the lock."""
    return holder.boot != boot_id() and time.time() - holder.heartbeat < LEASE_SECONDS
