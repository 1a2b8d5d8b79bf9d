"""Split files with classes by name: one table ``splits.csv``, or lists ``train.txt``, ``val.txt`` and ``test.txt``.

A table has a line of headers: ``path`` (relative to the folder), ``label`` (any word) and perhaps ``split`` (train, val or
test), between commas, semicolons or tabs. A line of a list is ``relative_path label``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError, unknown
from eva_lightning.names import check_path, shown
from eva_lightning.reading import LARGEST_TEXT, read_bytes, reading

#: The table that is found by itself.
TABLE = "splits.csv"
#: The names of the parts of other layouts, by what they are for.
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}

_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image"),
    "label": ("label", "class", "class_name", "category"),
    "split": ("split", "part", "subset"),
}
PART_OF = {name: part for part, names in PARTS.items() for name in names}
_EXPECTED = "a first line with the columns path and label, and perhaps split"

Row = tuple[str, str, str, str]
"""Where a line stands (for messages), path, label, part."""
Listed = dict[str, dict[str, list[str]]]
"""Part (``"train"``, ``"val"``, ``"test"``; ``""`` where a table does not say) -> class -> paths of its images."""


def find_split_file(folder: Path) -> Path | None:
    """The table in a folder, or the first of its lists; None without."""
    candidates = (TABLE, *(f"{name}.txt" for name in PARTS["train"]))
    found = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if found is None or found.name == TABLE:
        return found
    others = [f"{name}.txt" for part in ("val", "test") for name in PARTS[part]]
    # one list alone may be anything: notes beside class folders
    return found if any((folder / name).is_file() for name in others) else None


def read_split_file(file: Path) -> Listed:
    """What a split file lists, classes in order: by number where all are numbers, else by name.

    Args:
        file: A table, or one of the lists ``train.txt``, ``val.txt`` and ``test.txt``, which are read together.

    Raises:
        MissingInputError: There is no such file.
        InputError: It is no text, a line or column is missing or not as expected, a path leaves the folder, or an image is
            listed twice.
    """
    if file.suffix.lower() == ".txt":
        if file.stem not in PARTS["train"]:
            raise InputError(
                f"split file {file} must be a table (.csv, .tsv), or the list train.txt beside val.txt or test.txt"
            )
        if not file.is_file():
            raise MissingInputError(f"split file {file} does not exist")
        names = [(part, file.parent / f"{name}.txt") for part, names in PARTS.items() for name in names]
        rows: Iterator[Row] = (row for part, each in names if each.is_file() for row in _list_rows(each, part))
    else:
        rows = _table_rows(file)
    found: Listed = {}
    seen: dict[str, str] = {}
    for where, path, label, part in rows:
        path = check_path(f"{where}: the path", path).as_posix()
        if not label.isprintable():
            raise InputError(f"{where}: the label must be a word that can be printed, got {shown(label)}")
        if path in seen:
            raise InputError(f"{where}: {shown(path)} is listed in {seen[path]} already: list every image once")
        seen[path] = where
        found.setdefault(part, {}).setdefault(label, []).append(path)
    if not found:
        raise InputError(f"{file} lists no image: {_EXPECTED} is read, then a line per image")
    if "" in found and len(found) > 1:
        raise InputError(
            f"{file}: some images have no split: write train, val or test for each, or leave the column out"
        )
    return {part: _in_order(classes) for part, classes in found.items()}


def _in_order(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    numbers = all(name.isdecimal() and name.isascii() and len(name) < 10 for name in classes)
    return dict(sorted(classes.items(), key=lambda item: (int(item[0]) if numbers else 0, item[0])))


def _lines(file: Path) -> list[str]:
    try:
        return read_bytes(file, LARGEST_TEXT, what="split file").decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"split file {file} is not a text in UTF-8 ({error.reason}): save it as UTF-8") from None


def _list_rows(file: Path, part: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        words = line.strip().rsplit(maxsplit=1)
        if len(words) < 2:
            raise InputError(f"{file} line {number}: expected 'relative_path label', got {shown(line.strip())}")
        yield f"{file} line {number}", words[0], words[1], part


def _table_rows(file: Path) -> Iterator[Row]:
    lines = _lines(file)
    first = lines[0] if lines else ""
    delimiter = max(",;\t", key=first.count)
    with reading(file, "write it anew", "split file"):
        headers, *rows = [*csv.reader(lines, delimiter=delimiter, strict=True)] or [[]]
    columns = _columns(file, headers)
    for number, row in enumerate(rows, start=2):
        where = f"{file} line {number}"
        cells = {name: row[place].strip() if place < len(row) else "" for name, place in columns.items()}
        if not any(cells.values()):
            continue
        if not (cells["path"] and cells["label"]):
            raise InputError(f"{where}: path and label are needed, got {shown(delimiter.join(row))}")
        part = cells.get("split", "").lower()
        if part and part not in PART_OF:
            raise InputError(f"{where}: {unknown('split', part, PARTS)}")
        yield where, cells["path"], cells["label"], PART_OF.get(part, "")


def _columns(file: Path, headers: list[str]) -> dict[str, int]:
    """Where each column stands."""
    there = [name.strip().lower() for name in headers]
    found = {
        column: next(there.index(name) for name in names if name in there)
        for column, names in _COLUMNS.items()
        if not set(names).isdisjoint(there)
    }
    lacking = next((column for column in ("path", "label") if column not in found), None)
    if lacking is not None:
        raise InputError(
            f"split file {file} has no column {lacking}, got {shown(', '.join(headers))}: {_EXPECTED} is read"
        )
    return found
