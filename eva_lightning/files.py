"""Files and folders: writing all or nothing, digests, room on the disk, sizes in words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eva_lightning.errors import InputError

#: How numbers that are not finite stand in JSON, which has none: the words of protocol buffers' JSON.
NON_FINITE = ("NaN", "Infinity", "-Infinity")

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Readers see the old content or the new, never a part; a process that is killed leaves the old one. The content is
    on the disk before it takes the name, so that a power failure loses no more.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-", suffix=target.suffix or ".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` in UTF-8, all or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], document: Any) -> None:
    """Write a JSON document, all or nothing; see :func:`as_json`."""
    write_text(path, as_json(document, indent=2) + "\n")


def as_json(document: Any, indent: int | None = None) -> str:
    """A document as JSON that every program reads: numbers that are not finite become the words `NON_FINITE`."""
    return json.dumps(_in_words(document), indent=indent, allow_nan=False)


def _in_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_words(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_in_words(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return NON_FINITE[0] if math.isnan(value) else NON_FINITE[1 + (value < 0)]
    return value


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, made where it does not exist.

    Raises:
        InputError: It cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        raise InputError(f"{folder} cannot be written: {(error.strerror or str(error)).lower()}") from error
    return folder


@contextlib.contextmanager
def only_process(lock: Path, refusal: str) -> Iterator[None]:
    """Keep a second process away while the block runs; the end of this one, however it ends, lets it in.

    Raises:
        InputError: Another process holds `lock`; `refusal` is the beginning of the message.
    """
    from filelock import FileLock, Timeout  # of the experiments: EVA alone does without

    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise InputError(f"{refusal}: wait for it, or end it") from None


def digest(document: Any) -> str:
    """16 hexadecimal digits (of SHA-256) that identify a JSON document."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: str | os.PathLike[str], span: int | None = None) -> str:
    """SHA-256 of a file in hexadecimal digits.

    Args:
        path: The file.
        span: Read only so many bytes at its beginning and at its end; None: all of it.
    """
    found = hashlib.sha256()
    with Path(path).open("rb") as file:
        if span is None:
            for block in iter(lambda: file.read(1 << 20), b""):
                found.update(block)
        else:
            found.update(file.read(span))
            file.seek(max(0, Path(path).stat().st_size - span))
            found.update(file.read(span))
    return found.hexdigest()


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Room on the disk that holds `path`, which need not exist yet."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk is full; some libraries say so in words of their own."""
    while error is not None:
        if getattr(error, "errno", None) in _NO_ROOM or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def format_bytes(size: float) -> str:
    """``"0 B"``, ``"3.4 KiB"``, ``"1.2 GiB"``."""
    unit = 0
    while abs(size) >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
