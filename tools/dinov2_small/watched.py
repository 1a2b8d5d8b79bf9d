"""Downloads by other programs: how far they are, and an end to those that no longer get anywhere."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eva_lightning.errors import UnreachableError
from eva_lightning.files import format_bytes

Say = Callable[[str], None]

_LOOK_SECONDS = 0.25
_SAY_SECONDS = 5.0
_ADDRESS = re.compile(r"\S*://\S+")


def to_stderr(text: str) -> None:
    """Say something beside what a command prints."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit status, and all that it wrote."""

    status: int
    text: str

    def reason(self, mark: str) -> str:
        """The last line that begins with `mark` without it, or else the last one. Addresses, which may hold a password,
        are left out."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        marked = [line.removeprefix(mark).strip() for line in lines if line.startswith(mark)]
        return _ADDRESS.sub("…", (marked or lines or [f"exit status {self.status}"])[-1])[:200]


def run_watched(
    command: Sequence[str], folder: Path, total: int, patience: float, say: Say, environment: Mapping[str, str]
) -> Ended:
    """Run a program that downloads into `folder`.

    Args:
        command: The program and its arguments.
        folder: What it writes into; it need not exist.
        total: Bytes to come, for the reports of progress; 0 where it is not known.
        patience: Seconds without a further byte, after which the program is ended.
        say: Is told every few seconds how far it is.
        environment: Variables besides those of this process.

    Raises:
        UnreachableError: It got nowhere.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            _watch(process, folder, total, patience, say)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        output.seek(0)
        return Ended(process.returncode, output.read().decode(errors="replace"))


def _watch(process: subprocess.Popen[bytes], folder: Path, total: int, patience: float, say: Say) -> None:
    began = grew = said = time.monotonic()
    size = _size(folder)
    while True:
        try:
            process.wait(_LOOK_SECONDS)
            return
        except subprocess.TimeoutExpired:
            now, found = time.monotonic(), _size(folder)
        if found != size:
            size, grew = found, now
        if now - grew > patience:
            raise UnreachableError(f"nothing came for {patience:g} s")
        if now - said > _SAY_SECONDS:
            said = now
            of_all = f" of {format_bytes(total)}" if total else ""
            say(f"  {format_bytes(size)}{of_all}, {now - began:.0f} s")


def _size(folder: Path) -> int:
    """Of the largest file: the others are copies, or small."""
    largest = 0
    with contextlib.suppress(OSError):  # the program moved something meanwhile
        for path in folder.rglob("*"):
            largest = max(largest, path.stat().st_size)
    return largest
