"""Split files as VTAB-1K has them: lines ``relative_path int_label``, paths relative to the task's folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.names import check_path, shown
from eva_lightning.reading import LARGEST_TEXT, read_bytes
from eva_lightning.vision.data.tasks import TASKS

ARCHIVE = (
    "the archive vtab-1k.zip (4.7 GB, data set XiN0919/VTAB-1k on the Hugging Face hub; "
    "eva-lightning vtab prepare gets and unpacks it)"
)


def whence(folder: Path) -> str:
    """How to get the data of a task's folder, as the end of a message."""
    if folder.name in TASKS:
        return f"take it from {ARCHIVE}"
    return f"write it anew or bring back what it lists, as {folder.name} is none of VTAB-1K's tasks"


#: Python's own rule takes 1_0 and the digits of all scripts.
_LABEL = re.compile(r"[-+]?[0-9]{1,9}")


@dataclass(frozen=True)
class Split:
    """The images of one split: `paths` relative to `folder`, `labels` in ``[0, classes)``, in the order of the file.

    `source` is the file that lists them, where it is not ``NAME.txt`` in the folder.
    """

    name: str
    folder: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    source: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def listed_in(self) -> str:
        """The file that lists the images, for messages."""
        return self.source or f"{self.name}.txt"

    def first(self, n: int | None) -> Split:
        """The first `n` images (all for None)."""
        return self if n is None else replace(self, paths=self.paths[:n], labels=self.labels[:n])


def read_split(folder: Path, split: str, classes: int) -> Split:
    """Read ``<folder>/<split>.txt``; images are not touched.

    Raises:
        MissingInputError: The file is missing; says how to get it.
        InputError: A line is not ``relative_path int_label``, a path leaves the folder, a label is outside
            ``[0, classes)``, or there is no line.
    """
    file = folder / f"{split}.txt"
    if not file.is_file():
        if split == "train800val200" and all((folder / f"{part}.txt").is_file() for part in ("train800", "val200")):
            remedy = (
                "join train800.txt and val200.txt, in this order, into it (eva-lightning vtab prepare does)"
            )
        else:
            remedy = whence(folder)
        raise MissingInputError(f"split file {file} is missing: {remedy}")
    paths: list[str] = []
    labels: list[int] = []
    try:
        lines = read_bytes(file, LARGEST_TEXT).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a text file of lines 'relative_path int_label' ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            path, label = line.strip().rsplit(maxsplit=1)
            if _LABEL.fullmatch(label) is None:
                raise ValueError(label)
            value = int(label)
        except ValueError:
            raise InputError(
                f"{file} line {number}: expected 'relative_path int_label', got {shown(line.strip())}"
            ) from None
        if not 0 <= value < classes:
            raise InputError(
                f"{file} line {number}: label must be in 0..{classes - 1} for {folder.name}, got {shown(value)}"
            )
        check_path(f"{file} line {number}: the path", path)
        paths.append(path)
        labels.append(value)
    if not paths:
        raise InputError(f"{file} lists no image: {whence(folder)}")
    return Split(split, folder, tuple(paths), tuple(labels))
