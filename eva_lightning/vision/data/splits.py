"""Reading and checking a VTAB-1K folder: everything that can be wrong with it is reported before a model is built.

Layout: ``<root>/<task>/{train800,val200,train800val200,test}.txt``, each line ``relative_path int_label``, paths
relative to the task folder. Only text files are read, and images are only found to exist: 7,000 of them take about
0.1 s. A folder that is none of VTAB-1K's tasks may have other layouts (:mod:`eva_lightning.vision.data.own_tasks`).
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError, check_choice, check_number
from eva_lightning.files import file_digest
from eva_lightning.reading import reading
from eva_lightning.vision.data.own_tasks import (
    Drawing,
    class_names,
    listed_task,
    own_folder,
    read_own_task,
    uses_split_files,
)
from eva_lightning.vision.data.split_files import ARCHIVE, Split, read_split, whence
from eva_lightning.vision.data.tasks import SPLITS, TASKS, VTABTask, expected_size

#: Training split -> the split it is judged on: the final protocol and the tuning protocol of the paper (section D.3).
PROTOCOLS: dict[str, str] = {"train800val200": "test", "train800": "val200"}


@dataclass(frozen=True)
class TaskData:
    """A checked task: what to train on, what to evaluate on, and what a reader of the numbers must know.

    Attributes:
        warnings: One sentence per thing that is unusual but can be worked with.
        limited: Only the first images of a split are used (quick trials).
        comparable: The files have the official sizes and nothing is limited. Whether they hold the official
            images is not checked.
        validation: What is evaluated after every epoch; None for nothing. Never test images.
        class_names: In the order of the labels; the labels themselves where nothing names them.
    """

    task: VTABTask
    train: Split
    evaluation: Split
    warnings: tuple[str, ...]
    limited: bool
    comparable: bool
    validation: Split | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Opened:
    """A folder of images, read: what task it is, what gives its splits by name, the names of its classes."""

    task: VTABTask
    read: Callable[[str], Split]
    class_names: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def _opened(folder: Path, task: VTABTask | None = None, drawing: Drawing | None = None) -> _Opened:
    """Of the official `task`, or of one that the folder itself tells."""
    if task is not None or uses_split_files(folder, drawing):
        found = task or listed_task(folder)
        names = class_names(folder)
        if len(names) < found.classes:
            names = tuple(map(str, range(found.classes)))
        return _Opened(found, lambda split: read_split(folder, split, found.classes), names)
    own = read_own_task(folder, drawing)

    def drawn(split: str) -> Split:
        paths, labels = zip(*own.splits[split], strict=True)
        return Split(split, folder, paths, labels, own.source)

    said = tuple(f"{place} holds no image that is read" for place in own.without_images)
    return _Opened(own.as_task(folder), drawn, own.classes, said)


def files_digest(folder: Path, paths: Iterable[str], first: str = "") -> str:
    """SHA-256 that changes when `first`, the list of `paths`, or the size or time of one of these files changes."""
    digest = hashlib.sha256(first.encode())
    for path in paths:
        status = (folder / path).stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def open_task(
    root: str | Path,
    task: str,
    split: str = "train800val200",
    limit_train: int | None = None,
    limit_test: int | None = None,
    evaluation: str | None = None,
) -> TaskData:
    """Read and check the split files of one task, and make sure that every image they list exists.

    A class that no present split file mentions is an error where ``test.txt`` is present (the official test sets hold
    every class, so part of the data is lost). A class that only the training file lacks is a warning: 1,000 images need
    not contain every one of, say, the 397 classes of SUN397.

    Args:
        root: Folder that holds the task folders.
        task: Task name, see :data:`~eva_lightning.vision.data.tasks.TASKS`, or another folder in `root`.
        split: ``"train800val200"`` (evaluated on test) or ``"train800"`` (evaluated on val200).
        limit_train: Use only the first so many training images.
        limit_test: Use only the first so many evaluation images.
        evaluation: ``"val200"`` or ``"test"`` instead of what `split` is evaluated on.

    Raises:
        MissingInputError: Root, task folder, split file or image missing.
        InputError: Unknown task or split, bad line, label outside the range, label gap, limit below 1, or evaluation on
            images that are trained on.
    """
    if task not in TASKS:
        own_folder(root, task)
    check_choice("split", split, PROTOCOLS)
    evaluated_on = PROTOCOLS[split] if evaluation is None else evaluation
    check_choice("evaluation", evaluated_on, PROTOCOLS.values())
    if (split, evaluated_on) == ("train800val200", "val200"):
        raise InputError("evaluation on val200 needs split='train800': train800val200 trains on the images of val200")
    for option, limit in (("limit_train", limit_train), ("limit_test", limit_test)):
        if limit is not None:
            check_number(option, limit, at_least=1, whole=True)
    folder = _task_folder(Path(root), task)
    opened = _opened(folder, TASKS.get(task))
    spec, read = opened.task, opened.read
    complete = {name: read(name) for name in (split, evaluated_on)}
    warnings = _size_warnings(spec, complete.values())
    comparable = not warnings
    warnings += opened.warnings
    warnings += _class_warnings(spec, folder, read, complete[split], complete[evaluated_on])
    train = complete[split].first(limit_train)
    evaluated = complete[evaluated_on].first(limit_test)
    _require_apart(train, evaluated)
    limited = len(train) < len(complete[split]) or len(evaluated) < len(complete[evaluated_on])
    validation = None if evaluated_on == "test" else evaluated
    return TaskData(
        spec, train, evaluated, tuple(warnings), limited, comparable and not limited, validation, opened.class_names
    )


def open_folder(
    folder: str | Path, drawing: Drawing | None = None, *, hold_out: bool = True, evaluation: str = "test"
) -> TaskData:
    """Read and check a folder of images in any layout (:mod:`eva_lightning.vision.data.own_tasks`).

    Args:
        folder: The folder.
        drawing: How images are divided where the folder does not say.
        hold_out: Keep the images that validate out of the training; else they are trained on, and nothing validates.
        evaluation: ``"test"``, or ``"val"``: what a test evaluates is the images that validate.

    Raises:
        MissingInputError: Folder, split file or image missing.
        InputError: No layout that is known, less than two classes, a class with too few images, or images that are in two
            parts.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise MissingInputError(
            f"there is no folder of images {folder}: name one with a folder for each class, or a split file"
        )
    check_choice("evaluation", evaluation, ("test", "val"))
    if evaluation == "val" and not hold_out:
        raise InputError("evaluation on val needs hold_out: otherwise the images that validate are trained on")
    opened = _opened(place, drawing=drawing)
    spec, read = opened.task, opened.read
    train, test = read("train800" if hold_out else "train800val200"), read("test")
    validation = read("val200") if hold_out else None
    warnings = [*opened.warnings, *_class_warnings(spec, place, read, train, test)]
    _require_apart(train, test)
    if validation is not None:
        _require_apart(train, validation)
        _require_apart(validation, test, "validated")
    warnings += _copy_warnings(train, test)
    train = _called("train" if hold_out else "train+val", train)
    validation = None if validation is None else _called("val", validation)
    evaluated = _called("test", test) if validation is None or evaluation == "test" else validation
    return TaskData(spec, train, evaluated, tuple(warnings), False, False, validation, opened.class_names)


def _called(name: str, split: Split) -> Split:
    return replace(split, name=name, source=split.listed_in)


def _task_folder(root: Path, task: str) -> Path:
    if not root.is_dir():
        raise MissingInputError(
            f"the VTAB-1K folder {root} does not exist: unpack {ARCHIVE} and pass its folder as root"
        )
    folder = root / task
    if folder.is_dir():
        return folder
    if any((root / f"{split}.txt").is_file() for split in SPLITS):
        raise MissingInputError(
            f"{root} is itself a task folder: pass its parent folder ({root.resolve().parent}) as root"
        )
    present = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    deeper = next((root / name for name in present if (root / name / task).is_dir()), None)
    if deeper is not None:
        raise MissingInputError(f"{root} has no folder {task}, but {deeper} does: pass that as root")
    raise MissingInputError(
        f"{root} has no folder {task} (it holds: {', '.join(present) or 'no folder'}): take it from {ARCHIVE}"
    )


def _size_warnings(spec: VTABTask, splits: Iterable[Split]) -> list[str]:
    if not spec.is_official:
        return [
            f"{spec.name} is none of VTAB-1K's tasks: {spec.classes} classes and the splits are those of its folder"
        ]
    return [
        f"{split.folder.name}/{split.name}.txt lists {len(split)} images where VTAB-1K has "
        f"{expected_size(spec, split.name)}: results are not comparable with published VTAB-1K numbers"
        for split in splits
        if len(split) != expected_size(spec, split.name)
    ]


def _class_warnings(
    spec: VTABTask, folder: Path, read: Callable[[str], Split], train: Split, evaluation: Split
) -> list[str]:
    everywhere = set(train.labels) | set(evaluation.labels)
    for name in SPLITS:
        if name not in (train.name, evaluation.name) and (folder / f"{name}.txt").is_file():
            everywhere |= set(read(name).labels)
    lost = sorted(set(range(spec.classes)) - everywhere)
    if lost and (folder / "test.txt").is_file():
        raise InputError(
            f"label gap in {folder}: {len(lost)} of the {spec.classes} classes ({_listed(lost)}) occur in no split "
            f"file, so part of the data is lost: {whence(folder)}"
        )
    sentences = []
    for split, meaning in ((train, "they cannot be learned"), (evaluation, "nothing is said of them")):
        unseen = sorted(set(range(spec.classes)) - set(split.labels))
        # 200 images need not hold every class
        if unseen and split.name != "val200":
            sentences.append(
                f"{folder.name}/{split.name}.txt has no example of {len(unseen)} of the {spec.classes} classes "
                f"({_listed(unseen)}): {meaning}"
            )
    return sentences


def _require_apart(train: Split, evaluation: Split, used: str = "trained") -> None:
    """Every image is there, and none of those to evaluate on is trained on, not even through a link."""
    trained = set(_found(train).values())
    both = [path for path, file in _found(evaluation).items() if file in trained]
    if both:
        raise InputError(
            f"image {evaluation.folder / both[0]}, listed in {evaluation.name}, is also {used} on: {len(both)} of its "
            f"{len(evaluation)} images are in {train.name} too; an accuracy on them would say nothing, so list them once"
        )


def _copy_warnings(train: Split, test: Split) -> list[str]:
    """Whether images to test are copies of some to train on, under other names."""
    sizes = {file: file.stat().st_size for file in (train.folder / path for path in train.paths)}
    tested = {file: file.stat().st_size for file in (test.folder / path for path in test.paths)}
    shared = {*sizes.values()} & {*tested.values()}
    originals = {_content(file): file for file, size in sizes.items() if size in shared}
    pairs = [
        (file, originals[content])
        for file, size in tested.items()
        if size in shared and (content := _content(file)) in originals
    ]
    if not pairs:
        return []
    return [
        f"{len(pairs)} of the {len(test)} images to test are copies of images to train on, such as {pairs[0][0]} of "
        f"{pairs[0][1]}: an accuracy on them says nothing of new images"
    ]


def _content(file: Path) -> str:
    with reading(file, what="image"):
        return file_digest(file)


def _found(split: Split) -> dict[str, tuple[int, int]]:
    """Image -> what tells its file from others, whatever name it has."""
    found, missing = {}, []
    for path in split.paths:
        try:
            status = (split.folder / path).stat()
        except OSError:
            missing.append(path)
            continue
        if stat.S_ISREG(status.st_mode):
            found[path] = (status.st_dev, status.st_ino) if status.st_ino else (0, hash(path))
        else:
            missing.append(path)
    if missing:
        raise MissingInputError(
            f"image {split.folder / missing[0]}, listed in {split.listed_in}, is missing "
            f"({len(missing)} of its {len(split)} images are): {whence(split.folder)}"
        )
    return found


def _listed(labels: list[int], most: int = 5) -> str:
    return ", ".join(map(str, labels[:most])) + (", …" if len(labels) > most else "")
