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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eva_lightning.errors import DiskFullError, InputError, UnwritableError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: How numbers that are not finite stand in JSON, which has none: the words of protocol buffers' JSON.
NON_FINITE = ("NaN", "Infinity", "-Infinity")

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EFBIG, errno.EROFS)
_TEMPORARY = ".eva_lightning-"
#: Folders in which this process has removed what killed ones left.
_tidied: set[Path] = set()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error.

    Readers see the old content or the new, never a part; a process that is killed, a full disk and a power failure
    leave the old one: the content is on the disk before it takes the name, and the name before this returns.

    Raises:
        DiskFullError: The disk is full.
        UnwritableError: The file cannot be written for another reason.
    """
    target = Path(path)
    # the suffix, because libraries choose a format by it
    with _beside(target.parent, target, lambda: _new_file(target.parent, target.suffix or ".part")) as temporary:
        try:
            with _saying_no_room(target):
                yield temporary
            with saying_why(target):
                _settle(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(folder: str | os.PathLike[str], last: str) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when the block ends without an error; others there stay.

    For libraries that write several files by names of their own. Every file is replaced as by :func:`replacing`, once
    all are written. The one named `last`, without which readers take none of the others, goes first and comes last: a
    kill in between leaves no old file beside a new one that pass for a whole.

    Raises:
        DiskFullError, UnwritableError: As :func:`replacing`.
    """
    target = Path(folder)
    is_new = not target.exists()
    with _beside(target, target, lambda: tempfile.mkdtemp(dir=target, prefix=_TEMPORARY)) as temporary:
        try:
            with _saying_no_room(target):
                yield temporary
            with saying_why(target):
                files = sorted(temporary.iterdir(), key=lambda file: file.name == last)
                if len(files) > 1:
                    (target / last).unlink(missing_ok=True)
                    _sync_folder(target)
                for file in files:
                    _settle(file, target / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    target.rmdir()


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


def with_numbers(document: Any) -> Any:
    """A document of results that was read from JSON, with numbers in the place of the words `NON_FINITE`."""
    if isinstance(document, dict):
        return {key: with_numbers(entry) for key, entry in document.items()}
    if isinstance(document, list):
        return [with_numbers(entry) for entry in document]
    return float(document) if isinstance(document, str) and document in NON_FINITE else document


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
        DiskFullError, UnwritableError: It cannot be made or written.
    """
    folder = Path(path)
    with saying_why(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that the folder `path`, which need not exist yet, can be written; nothing is left there.

    Raises:
        DiskFullError, UnwritableError: It cannot.
    """
    with saying_why(Path(path)), tempfile.TemporaryFile(dir=_existing(Path(path))):
        pass


@contextlib.contextmanager
def saying_why(target: Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing `target` into the sentence for a user.

    Raises:
        DiskFullError: The disk is full.
        UnwritableError: The file or folder cannot be written for another reason.
    """
    with _saying_no_room(target):
        try:
            yield
        except (UnwritableError, DiskFullError):
            raise
        except OSError as error:
            if is_disk_full(error):
                raise
            raise _unwritable(target, error) from error


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
    return shutil.disk_usage(_existing(Path(path))).free


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


def temporary_name(ending: str) -> str:
    """A name that :func:`is_temporary` knows, and that the next process to write there deletes."""
    return f"{_TEMPORARY}{ending}"


def is_temporary(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is one that :func:`replacing` or :func:`filling` works in, or has left."""
    return Path(path).name.startswith(_TEMPORARY)


def _unwritable(target: Path, error: OSError) -> UnwritableError:
    return UnwritableError(f"cannot write to {target}: {(error.strerror or str(error)).lower()}")


@contextlib.contextmanager
def _saying_no_room(target: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise _unwritable(target, error) from error
        if isinstance(error, DiskFullError) or not is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk that holds {target} is full ({format_bytes(free_bytes(target))} free): what was there stays; "
            "make room, then run it again"
        ) from error


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def _make_folder(folder: Path) -> None:
    """As ``mkdir(parents=True)``, and a power failure does not undo it."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


@contextlib.contextmanager
def _beside(folder: Path, target: Path, make: Callable[[], str]) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        with saying_why(target):
            _make_folder(folder)
            _remove_leftovers(folder)
            temporary = stack.enter_context(_claimed(make))
        yield temporary


def _new_file(folder: Path, suffix: str) -> str:
    handle, name = tempfile.mkstemp(dir=folder, prefix=_TEMPORARY, suffix=suffix)
    os.close(handle)
    return name


@contextlib.contextmanager
def _claimed(make: Callable[[], str]) -> Iterator[Path]:
    """What `make` creates, under a lock that tells it from what a killed process left: its process ends it."""
    path, handle = Path(make()), None
    try:
        while fcntl is not None:
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY)
                with contextlib.suppress(OSError):  # a file system that knows no locks
                    fcntl.flock(handle, fcntl.LOCK_EX)
                if os.fstat(handle).st_nlink:
                    break
                os.close(handle)
            # another process took it for a leftover before the lock
            path = Path(make())
        yield path
    finally:
        if handle is not None:
            os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left, once per process and folder."""
    if fcntl is None or folder.absolute() in _tidied:
        return
    _tidied.add(folder.absolute())
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()
            finally:
                os.close(handle)


def _settle(temporary: Path, target: Path) -> None:
    """Give a finished file its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    with contextlib.suppress(PermissionError):  # a file system that knows no permissions
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
    temporary.replace(target)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
