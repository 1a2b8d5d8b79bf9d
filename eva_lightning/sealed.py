"""Files that hold a checksum of themselves, verified when they are read; what to do with one that is damaged.

The checksum is inside the file, so that no kill can part them: in JSON an entry, in an archive of ``torch.save`` the
comment at its end, which torch and Lightning do not look at. It finds damage, not forgery: a forger writes another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from eva_lightning.errors import DamagedFileError, InputError, MissingInputError
from eva_lightning.files import as_json, digest, write_text
from eva_lightning.reading import parse_json, read_text

_LOGGER = logging.getLogger(__name__)

CHECKSUM = "checksum"
"""The entry of a JSON document that holds the checksum of the others."""

_MARK = "content-sha256:"
_INDENTED = '\n "'
_SEAL = re.compile(rb"eva_lightning sha256:([0-9a-f]{64})")
_SEAL_LENGTH = len(b"eva_lightning sha256:") + 64
_LENGTH_FIELD = 2  # bytes before a zip archive's comment that say how long it is
_BLOCK = 1 << 20


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON document with its checksum."""
    content = json.loads(as_json(document))  # keys become words, tuples lists: as they will be read
    return {**content, CHECKSUM: _MARK + digest(content)}


def write_sealed_json(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a JSON document with its checksum, all or nothing."""
    write_text(path, json.dumps(sealed(document), indent=1) + "\n")


def read_sealed_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The document without its checksum; one of an earlier version, which has none, is taken as it is.

    Raises:
        DamagedFileError: The file is cut, changed, or no JSON document.
    """
    try:
        # earlier versions wrote NaN as Python does
        text = read_text(path)
        document = parse_json(text, path, non_finite=True)
    except MissingInputError:
        raise
    except InputError as error:
        raise DamagedFileError(str(error)) from error
    if not isinstance(document, dict):
        raise DamagedFileError(f"{path} is damaged (no mapping in it)")
    expected = document.pop(CHECKSUM, None)
    # files with a checksum are indented in their own way, so that they are known by it even where the checksum is lost
    lost = _INDENTED in text
    if (expected is None and lost) or (expected is not None and expected != _MARK + digest(document)):
        raise DamagedFileError(f"{path} is damaged (its checksum differs: something in it was changed)")
    return document


class SealedWriter:
    """What ``torch.save`` writes to: hands all on to `file`, and ends it with the checksum.

    The first error is kept until :meth:`end`: torch would hide it behind one of its own.

    Args:
        file: Open for writing, at its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of `data`."""
        if self._error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """For torch; the file is flushed when it is closed."""

    def end(self) -> None:
        """Make the checksum the archive's comment.

        Raises:
            OSError: Something could not be written.
        """
        if self._error is not None:
            raise self._error
        self._file.seek(-_LENGTH_FIELD, os.SEEK_END)
        self._file.write(struct.pack("<H", _SEAL_LENGTH))
        self._file.write(f"eva_lightning sha256:{self._digest.hexdigest()}".encode())


def damage(file: Path) -> str | None:
    """What is wrong with a file that ``torch.save`` wrote, or None; its content is neither loaded nor unpickled.

    Ours have a checksum over every byte. Others are compared with the CRC-32 that every entry of the archive has.
    """
    size = file.stat().st_size
    if size == 0:
        return "it is empty"
    with file.open("rb") as stream:
        stream.seek(max(0, size - _SEAL_LENGTH))
        seal = _SEAL.fullmatch(stream.read())
        if seal is not None:
            return None if _body_digest(stream, size) == seal[1].decode() else "its checksum differs"
    try:
        with zipfile.ZipFile(file) as archive:
            # torch writes no other comment and does not compress
            if archive.comment or any(map(is_unusual, archive.infolist())):
                return "its end was changed"
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                return "it is no file of torch.save"
            wrong = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error) as error:
        return f"it is cut or changed: {str(error)[:120]}"
    return None if wrong is None else f"its part {wrong} was changed"


def is_unusual(entry: zipfile.ZipInfo) -> bool:
    """Packed; or marked as a folder, of which torch takes the bytes from memory that nobody has written."""
    return entry.compress_type != zipfile.ZIP_STORED or bool(entry.external_attr & 0x10)


def previous(file: Path) -> Path:
    """Where the checkpoint before `file` is kept."""
    return file.with_name(f"{file.name}.previous")


def whole_checkpoint(file: Path) -> Path | None:
    """`file`, or the one before it where it is damaged or missing; None where there is neither.

    Damaged ones are set aside, and a warning says what happens instead.
    """
    for candidate in (file, previous(file)):
        reason = damage(candidate) if candidate.is_file() else None
        if reason is not None:
            earlier = candidate == file and previous(file).is_file()
            set_aside(
                candidate,
                f"{candidate} is damaged ({reason})",
                "going back to the checkpoint before it" if earlier else "starting again",
            )
        elif candidate.is_file():
            return candidate
    return None


def set_aside(file: Path, what: str, instead: str) -> Path:
    """Rename a damaged file, so that it is neither used nor lost, and say so.

    Args:
        file: The file.
        what: A sentence that names it and says what is wrong, such as that of a :class:`DamagedFileError`.
        instead: What happens now.

    Returns:
        Its new name.
    """
    target, number = file.with_name(f"{file.name}.damaged"), 1
    while target.exists():
        number += 1
        target = file.with_name(f"{file.name}.damaged-{number}")
    try:
        file.replace(target)
        where = f"set aside as {target.name}"
    except OSError as error:  # another process was faster, or the folder cannot be written
        where = f"not set aside ({(error.strerror or str(error)).lower()})"
    _LOGGER.warning("%s: %s, %s", what, where, instead)
    return target


def _body_digest(stream: BinaryIO, size: int) -> str:
    """SHA-256 of an archive as it was before it had a comment."""
    found, left = hashlib.sha256(), size - _SEAL_LENGTH - _LENGTH_FIELD
    stream.seek(0)
    while left > 0 and (block := stream.read(min(_BLOCK, left))):
        found.update(block)
        left -= len(block)
    length = stream.read(_LENGTH_FIELD)
    found.update(b"\0\0" if length == struct.pack("<H", _SEAL_LENGTH) else length)
    return found.hexdigest()
