"""What may be the name of a file or folder: the one rule for names from flags, lists, indexes and archives.

A safe name is one part of a path on every system: it can neither leave the folder it belongs to, nor hide in a
terminal, nor be longer than a file system takes. Letters of all scripts, spaces and punctuation are fine.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath

from eva_lightning.errors import InputError, InputTypeError

#: Bytes of a name that file systems take.
LONGEST = 255
#: Bytes of a whole path (Linux; others take less than half).
LONGEST_PATH = 4096
#: Bytes that our temporary files add to the name they will take: ``.NAME-xxxxxxxx.SUFFIX``.
TEMPORARY_ROOM = 24


def unsafe_because(name: object, room: int = 0) -> str | None:
    """Why `name` is not safe as the name of one file or folder; None where it is.

    Args:
        name: What was given.
        room: Bytes to keep free for what is added to the name.
    """
    if not isinstance(name, str):
        return f"it is no text but {type(name).__name__}"
    if not name.strip():
        return "it is empty"
    if name in (".", ".."):
        return "it means another folder"
    if "/" in name or PureWindowsPath(name).drive:
        return "it has more than one part"
    if "\\" in name:
        return "it has a backslash, and / is what stands between the names of a path"
    if not name.isprintable() and any(map(_is_control, name)):
        return "it has control characters"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    length = len(name.encode())
    if length + room > LONGEST:
        return f"it has {length} bytes, and {LONGEST - room} is the most"
    return None


def _is_control(character: str) -> bool:
    """Control characters, those that turn text round or are not seen, halves of pairs, ends of lines.

    The two that join letters, or keep them apart, are part of some scripts.
    """
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def check_name(what: str, name: object, *, room: int = 0, setting: str | None = None) -> str:
    """`name`, once it is found safe as the name of one file or folder.

    Args:
        what: What it names, for the message: ``"name"``, or ``"index.json: file of push-v3"``.
        name: What was given.
        room: Bytes to keep free for what is added to the name, such as ``TEMPORARY_ROOM``.
        setting: The setting at fault, where it is one.

    Raises:
        InputTypeError: It is no text.
        InputError: It is not safe.
    """
    reason = unsafe_because(name, room)
    if reason is not None:
        kind = InputError if isinstance(name, str) else InputTypeError
        raise kind(f"{what} must be the plain name of a file or folder, got {shown(name)}: {reason}", setting=setting)
    assert isinstance(name, str)
    return name


def check_path(what: str, path: object, *, room: int = 0, setting: str | None = None) -> PurePosixPath:
    """`path`, once every part of it is found safe: a relative path, with ``/`` between names, below some folder.

    Args:
        what, path, room, setting: As in :func:`check_name`.

    Raises:
        InputTypeError: It is no text.
        InputError: It is absolute, or a part of it is not safe.
    """
    if not isinstance(path, str):
        raise InputTypeError(f"{what} must be a path, got {shown(path)}", setting=setting)
    # "a//b" and "./a" are what they are to the system: a/b and a
    whole = PurePosixPath(path)
    for part in whole.parts or ("",):
        reason = "it is absolute" if part == "/" else unsafe_because(part, room)
        if reason is not None:
            where = "" if part in (path, "/") else f" in {shown(part)}"
            raise InputError(
                f"{what} must be a relative path inside its folder, got {shown(path)}{where}: {reason}", setting=setting
            )
    return whole


def check_length(what: str, path: Path, room: int = 0, setting: str | None = None) -> Path:
    """`path`, of a folder to be made, once it and its names are found short enough for a file system.

    Args:
        what: For the message.
        path: May have any parts, ``..`` too: where a user wants something to be is the user's choice.
        room: Bytes to keep free for what will lie in the folder.
        setting: The setting at fault, where it is one.

    Raises:
        InputError: It is too long, or has a character that no file system takes.
    """
    text = str(path.absolute())
    if "\0" in text:
        raise InputError(f"{what} cannot be a path, got {shown(text)}: it has control characters", setting=setting)
    longest = max(len(part.encode(errors="surrogateescape")) for part in path.absolute().parts)
    if longest > LONGEST:
        raise InputError(
            f"{what} has a name of {longest} bytes, and {LONGEST} is the most: {shown(text)}", setting=setting
        )
    whole = len(text.encode(errors="surrogateescape")) + room
    if whole >= LONGEST_PATH:
        raise InputError(
            f"{what} would be a path of {whole} bytes, and {LONGEST_PATH - 1} is the most: {shown(text)}",
            setting=setting,
        )
    return path


def shown(value: object, most: int = 80) -> str:
    """`value` as a message shows it: quoted, control characters escaped, shortened in the middle."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"
