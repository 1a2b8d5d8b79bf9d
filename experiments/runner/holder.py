"""One process works in a folder: told from a dead one for certain on one machine, by a lease between machines.

Two means together. A lock ends with the process that holds it, however it ends, so on one machine (one kernel: also
between containers that share the folder) a free lock means a dead holder. Machines that share a folder do not all share
such locks; between them a heartbeat in ``holder.json`` decides: a holder that has not been heard of for
``LEASE_SECONDS`` counts as dead. One that was only asleep finds its token replaced and stops.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from eva_lightning.errors import InputError
from eva_lightning.files import write_json
from eva_lightning.reading import read_json, typed

#: Without a heartbeat for so long, a holder on another machine counts as dead.
LEASE_SECONDS = 120.0
#: Between signs of life.
HEARTBEAT_SECONDS = 10.0


class FolderInUse(InputError):
    """Another process runs a comparison in the folder."""


@dataclass(frozen=True)
class Holder:
    """A process that holds, or wants to hold, a folder: `boot` identifies the machine, `token` the process."""

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
        """Who and since when, for a message."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(max(self.since, 0.0), 2**40)))
        return f"process {self.pid} on {self.host}, since {since}"

    @property
    def is_alive(self) -> bool:
        """Whether it may still write, given that this process has got the lock."""
        return self.boot != boot_id() and time.time() - self.heartbeat < LEASE_SECONDS


class Hold:
    """A folder that this process holds; gives signs of life on a thread of its own.

    Attributes:
        taken_over: The dead holder it was taken over from.
    """

    def __init__(self, folder: Path, taken_over: Holder | None) -> None:
        self.taken_over = taken_over
        self._folder = folder
        self._me = Holder.myself()
        self._ended = threading.Event()
        self._lost: Holder | None = None
        _write(folder, self._me)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the folder is still held.

        Raises:
            FolderInUse: Another process has taken over, because this one was asleep for longer than the lease.
        """
        if self._lost is not None:
            raise _refusal(self._folder, self._lost)

    def heartbeat(self) -> None:
        """Say that this process lives, unless another one has taken over."""
        found = read_holder(self._folder)
        if found is not None and found.token != self._me.token:
            self._lost = found
            return
        # on a full disk what is being done will say so itself
        with suppress(OSError):
            _write(self._folder, replace(self._me, heartbeat=time.time()))

    def end(self) -> None:
        """Leave in order; whoever has taken over keeps the folder."""
        self._ended.set()
        self._thread.join()
        found = read_holder(self._folder)
        if found is not None and found.token == self._me.token:
            with suppress(OSError):
                _file(self._folder).unlink()

    def _live(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self.heartbeat()


@contextmanager
def held(folder: Path) -> Iterator[Hold]:
    """Hold `folder`, made first where there is none, for as long as the context lasts.

    Raises:
        FolderInUse: Another process holds it; says which and since when.
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(folder)
    if lock is None:
        raise _refusal(folder, read_holder(folder))
    try:
        before = read_holder(folder)
        if before is not None and before.is_alive:
            raise _refusal(folder, before)
        hold = Hold(folder, before)
        try:
            yield hold
        finally:
            hold.end()
    finally:
        lock.release()


def refuse_if_held(folder: Path) -> None:
    """Say at once, before anything that takes time, what :func:`held` would say now.

    Raises:
        FolderInUse: Another process holds the folder.
    """
    if _file(folder).is_file():
        lock = _take_lock(folder)
        if lock is None:
            raise _refusal(folder, read_holder(folder))
        lock.release()


def boot_id() -> str:
    """Something that is the same in all processes of this machine until it restarts."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text(encoding="ascii").strip() if file.is_file() else socket.gethostname()


def read_holder(folder: Path) -> Holder | None:
    """Whoever ``holder.json`` names; None where there is none, or nothing legible."""
    try:
        return typed(Holder, read_json(_file(folder)), _file(folder))
    except InputError:
        return None


def _write(folder: Path, holder: Holder) -> None:
    write_json(_file(folder), asdict(holder))


def _file(folder: Path) -> Path:
    return folder / "holder.json"


def _refusal(folder: Path, holder: Holder | None) -> FolderInUse:
    who = "" if holder is None else f" ({holder.text})"
    return FolderInUse(f"{folder} is in use by another process{who}: wait for it, end it, or choose another --output")


def _take_lock(folder: Path) -> FileLock | None:
    """The lock of `folder`, or None where another process has it.

    Where the file system knows no locks, the heartbeat alone decides.
    """
    lock = FileLock(folder / ".holder.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    except NotImplementedError:
        pass
    return lock
