"""What this project has written in a folder, told from what others have: only that is ever replaced or deleted.

A folder that the project writes into gets a hidden file that lists the names (or patterns, ``*.png``) it uses there,
before the first of them is written. A file at one of these names in a folder whose list lacks it is somebody else's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from eva_lightning.errors import InputError
from eva_lightning.files import write_text

MARK = ".eva_lightning"
_FIRST_LINE = "# names that eva_lightning writes in this folder; it leaves all others alone"


def is_marked(folder: Path) -> bool:
    """Whether this project has written into `folder`."""
    return (folder / MARK).is_file()


def refuse_others(folder: Path, names: Collection[str], remedy: str, *, known: Collection[str] = ()) -> None:
    """Make sure that nothing of somebody else's lies where this project is about to write; nothing is written.

    Args:
        folder: The folder; need not exist.
        names: What will be written in it: names, or patterns as of :mod:`fnmatch`.
        remedy: What to do instead, such as ``"choose another --output"``.
        known: Names that are this project's though no list says so.

    Raises:
        InputError: Something is there that this project has not written, or a link in place of a file or folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, and a folder is needed: {remedy}")
    listed = {*_listed(folder), *known}
    used = [path.name for path in sorted(folder.glob("*")) if _fits(path.name, names) and not _is_empty(path)]
    others = [name for name in used if not _fits(name, listed)]
    if others:
        text = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"{folder} holds files that this program has not written ({text}): move them away, or {remedy}"
        )
    links = [name for name in used if (folder / name).is_symlink()]
    if links:
        raise InputError(
            f"{folder / links[0]} is a symbolic link, and nothing is replaced or deleted through one: "
            f"remove it, or {remedy}"
        )


def claim(folder: Path, names: Collection[str], remedy: str, *, known: Collection[str] = ()) -> None:
    """:func:`refuse_others`, then note that this project writes `names` in `folder`, made where it does not exist.

    Raises:
        InputError: As :func:`refuse_others`.
    """
    refuse_others(folder, names, remedy, known=known)
    listed = _listed(folder)
    if not set(names) <= listed:
        write_text(folder / MARK, "\n".join([_FIRST_LINE, *sorted({*listed, *names})]) + "\n")


def delete(folder: Path, patterns: Collection[str]) -> None:
    """Delete the files in `folder` that fit `patterns`, paths with ``/``, and the folders this leaves empty.

    Links are not followed. Only for a folder where :func:`refuse_others` has passed.

    Args:
        folder: The folder, which stays.
        patterns: Of paths relative to it; ``**`` at the end stands for everything below.
    """
    folders: set[Path] = set()
    for file in list(_files(folder)):
        path = file.relative_to(folder).as_posix()
        if any(_path_fits(path, pattern) for pattern in patterns):
            file.unlink(missing_ok=True)
            folders.update(_parents(file, folder))
    for place in [place for place in _folders(folder) if _is_inside(place.relative_to(folder).as_posix(), patterns)]:
        folders.update((place, *_parents(place, folder)))
    for empty in sorted(folders, key=lambda each: len(each.parts), reverse=True):
        if _is_empty(empty):
            empty.rmdir()


def delete_tree(folder: Path) -> None:
    """Delete a folder that is this project's with all that is in it; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def _files(folder: Path) -> Iterator[Path]:
    """All files and links below `folder`, but not what links to folders lead to."""
    for place, folders, names in os.walk(folder):
        yield from (Path(place) / name for name in names)
        yield from (link for name in folders if (link := Path(place) / name).is_symlink())


def _folders(folder: Path) -> Iterator[Path]:
    """All folders below `folder`, but not what links to folders lead to."""
    for place, names, _ in os.walk(folder):
        yield from (below for name in names if not (below := Path(place) / name).is_symlink())


def _parents(path: Path, folder: Path) -> list[Path]:
    """The folders between `path` and `folder`."""
    return [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]


def _is_inside(path: str, patterns: Collection[str]) -> bool:
    return any(_path_fits(path, pattern) for pattern in patterns if pattern.endswith("/**"))


def _listed(folder: Path) -> set[str]:
    try:
        lines = (folder / MARK).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return set()
    return set(lines[1:]) if lines[:1] == [_FIRST_LINE] else set()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None


def _fits(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _path_fits(path: str, pattern: str) -> bool:
    parts, wanted = path.split("/"), pattern.split("/")
    if wanted[-1] == "**":
        parts, wanted = parts[: len(wanted) - 1], wanted[:-1]
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
