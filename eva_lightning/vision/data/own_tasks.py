"""Any folder of images as a task: classes and, where there are no split files, splits are read from the folder.

Layouts, the first that fits:

- ``train800.txt``, ``val200.txt``, ``train800val200.txt`` and ``test.txt``, as VTAB-1K's tasks have them; the number of
  classes is that of the lines of ``classes.txt``, else the largest label and one;
- a split file with classes by name: ``splits.csv``, or ``train.txt``, ``val.txt`` and ``test.txt``
  (:mod:`eva_lightning.vision.data.split_table`);
- ``train/CLASS/``, ``test/CLASS/`` and perhaps ``val/CLASS/`` with images (``Train``, ``validation`` and the like too);
- ``CLASS/`` with images: a quarter of every class is test.

Both kinds of class folders may lie below ``images/``.

Without ``val/``, a fifth of every class's training images validates. Images are drawn by the digest of their paths and a
seed, so that the same folder gives the same splits everywhere; :class:`Drawing` has other shares.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError, check_number, unknown
from eva_lightning.names import check_name, check_path, shown
from eva_lightning.reading import read_text
from eva_lightning.vision.data.decoding import image_files
from eva_lightning.vision.data.split_files import read_split
from eva_lightning.vision.data.split_table import PART_OF, Listed, find_split_file, read_split_file
from eva_lightning.vision.data.tasks import SPLITS, TASKS, VTABTask

#: Bound of the labels in split files, before the number of classes is known.
_MOST_CLASSES = 100_000
_LAYOUTS = (
    "a folder for each class, train/CLASS and test/CLASS, train800.txt, val200.txt, train800val200.txt and test.txt with "
    "lines 'relative_path int_label', or splits.csv with the columns path and label are read"
)
_TO = {"train": "train on", "val": "validate on", "test": "test on"}

Labelled = tuple[str, int]
"""Path of an image relative to the task's folder, and its label."""


@dataclass(frozen=True)
class Drawing:
    """How a folder without VTAB-1K's split files is divided, class by class.

    Attributes:
        test_share: Share of a class's images that are held out for the test, where the folder does not say which.
        val_share: Share of the other images of a class that validate, likewise. Of both at least one image.
        seed: Another seed draws other images.
        split_file: A split file instead of the one in the folder (:mod:`eva_lightning.vision.data.split_table`).

    Raises:
        InputError: A share is not between 0 and 1.
    """

    test_share: float = 0.25
    val_share: float = 0.2
    seed: int = 0
    split_file: Path | None = None

    def __post_init__(self) -> None:
        for name in ("test_share", "val_share"):
            check_number(name, getattr(self, name), above=0, below=1)
        check_number("split_seed", self.seed, at_least=0, whole=True)

    def order(self, path: str) -> str:
        """What the images of a class are sorted by before they are divided: the first are held out."""
        salt = f"{self.seed}:" if self.seed else ""
        return hashlib.sha256((salt + path).encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True)
class OwnTask:
    """A folder without VTAB-1K's split files, read.

    Attributes:
        classes: Names of the classes, in the order of their labels.
        splits: Split -> its images.
        source: The split file that lists them; empty where class folders do.
        without_images: Folders beside those of classes that hold no image that is read.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, tuple[Labelled, ...]]
    source: str = ""
    without_images: tuple[Path, ...] = ()

    def as_task(self, folder: Path) -> VTABTask:
        """What is known of it, as of VTAB-1K's tasks."""
        sizes = {split: len(images) for split, images in self.splits.items()}
        return VTABTask(_name_of(folder), "other", len(self.classes), sizes.pop("test"), sizes)


def find_task(root: str | Path, name: str) -> VTABTask:
    """The task called `name`: one of VTAB-1K, or a folder of images in `root`.

    Raises:
        InputError: Neither; suggests the nearest name. Or it has less than two classes, or a class with too few images.
        MissingInputError: The folder holds no images in a layout that is known.
    """
    return TASKS[name] if name in TASKS else folder_task(own_folder(root, name))


def own_folder(root: str | Path, name: str) -> Path:
    """The folder called `name` in `root`, which is none of VTAB-1K's tasks.

    Raises:
        InputError: It cannot be the name of a folder, or there is none; suggests the nearest task.
    """
    check_name("task", name, setting="task")
    folder = Path(root) / name
    if not folder.is_dir():
        raise InputError(f"{unknown('VTAB-1K task', name, TASKS)} (nor is it a folder of images in {root})")
    return folder


def folder_task(folder: Path) -> VTABTask:
    """The task that a folder of images is, whatever its name.

    Raises:
        MissingInputError, InputError: As :func:`find_task`.
    """
    return listed_task(folder) if uses_split_files(folder) else read_own_task(folder).as_task(folder)


def has_split_files(folder: Path) -> bool:
    """Whether a task's folder has any of VTAB-1K's split files; ``test.txt`` may be one of other lists."""
    there = [split for split in SPLITS if (folder / f"{split}.txt").is_file()]
    return bool(there) and (there != ["test"] or find_split_file(folder) is None)


def uses_split_files(folder: Path, drawing: Drawing | None = None) -> bool:
    """Whether a folder is divided by VTAB-1K's split files: it has some, and no other split file is asked for."""
    return has_split_files(folder) and (drawing is None or drawing.split_file is None)


def read_own_task(folder: Path, drawing: Drawing | None = None) -> OwnTask:
    """The classes of a folder without VTAB-1K's split files, and splits that are listed in it or drawn from it.

    Raises:
        MissingInputError: It holds no images in a layout that is known, or there is no such split file.
        InputError: Less than two classes, or a class with too few images.
    """
    drawing = drawing or Drawing()
    file = drawing.split_file or find_split_file(folder)
    if file is not None:
        listed = read_split_file(file)
        for part in listed.values():
            _refuse_alike(folder, part)
        return replace(_divided(folder, listed, drawing), source=str(file))
    base, parts = _layout(folder)
    found = {
        part: _images(folder, place, f"sort its images as those in {parts['train']} are, or move it away")
        for part, place in parts.items()
    } or {"": _images(folder, base, _LAYOUTS)}
    own = _divided(folder, {part: images for part, (images, _) in found.items()}, drawing)
    return replace(own, without_images=tuple(place for _, empty in found.values() for place in empty))


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the classes of a folder with VTAB-1K's split files, in the order of their labels; empty for unnamed ones.

    They are the lines of ``classes.txt``, without the label where each begins with it.
    """
    file = folder / "classes.txt"
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()] if file.is_file() else []
    words = [line.split(maxsplit=1) for line in lines]
    numbered = all(len(pair) == 2 and pair[0] == str(label) for label, pair in enumerate(words))
    return tuple(pair[1] for pair in words) if numbered else tuple(lines)


def _layout(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Where the class folders lie: in the first, or in those of the parts, where there are some to train and others.

    Raises:
        InputError: A part is there under two names, or folders look like parts under a name that is not known.
    """
    bases = [folder, *([folder / "images"] if (folder / "images").is_dir() else [])]
    for base in bases:
        parts: dict[str, Path] = {}
        for place in filter(Path.is_dir, _entries(base)):
            part = PART_OF.get(place.name.casefold())
            if part is not None and parts.setdefault(part, place) is not place:
                raise InputError(f"{parts[part]} and {place} are both images to {_TO[part]}: put them together")
        if "train" in parts and len(parts) > 1:
            return base, parts
    _refuse_unknown_parts(bases[-1])
    return bases[-1], {}


def _refuse_unknown_parts(base: Path) -> None:
    """Refuse folders that hold the same folders, one of them with a name such as ``training_set``: they are no classes."""
    places = [entry for entry in _entries(base) if entry.is_dir()]
    suspects = [each for each in places if not PART_OF.keys().isdisjoint(re.findall(r"[a-z]+", each.name.casefold()))]
    # archives often hold a part twice over: seg_train/seg_train/CLASS
    inner = {
        place: {each.name for below in ("*", "*/*") for each in place.glob(below) if each.is_dir()}
        for place in (places if suspects else ())
    }
    for place in suspects:
        alike = next((other for other in places if other != place and len(inner[place] & inner[other]) > 1), None)
        if alike is not None:
            raise InputError(
                f"{place} and {alike} hold folders of the same names, as parts do and classes do not: call the parts "
                "train, val and test"
            )


def _divided(folder: Path, listed: Listed, drawing: Drawing) -> OwnTask:
    """Splits of the images of each part and class; those of part ``""`` are divided too."""
    if set(listed) == {""}:
        return _drawn(folder, listed[""], drawing)
    if "train" not in listed or len(listed) < 2:
        raise InputError(
            f"{folder} has images of the split {next(iter(listed))} alone: list some to train and some to test"
        )
    return _of_parts(folder, listed, drawing)


def _drawn(folder: Path, images: Mapping[str, list[str]], drawing: Drawing) -> OwnTask:
    _check_classes(folder, images)
    train: list[Labelled] = []
    val: list[Labelled] = []
    test: list[Labelled] = []
    for label, (name, paths) in enumerate(images.items()):
        if len(paths) < 3:
            raise InputError(
                f"class {name} of {folder} has {len(paths)} image{'s' * (len(paths) != 1)}, and 3 are needed: one each "
                "to train, to validate and to test"
            )
        tested, others = _share(paths, drawing.test_share, drawing, keep=2)
        validated, trained = _share(others, drawing.val_share, drawing, keep=1)
        for part, chosen in ((train, trained), (val, validated), (test, tested)):
            part += [(path, label) for path in chosen]
    return _task(images, train, val, test, drawing)


def _of_parts(folder: Path, named: Listed, drawing: Drawing) -> OwnTask:
    """Of images to train and to test; those to validate stand in for test where there are none."""
    others = dict(named)
    tests = others.pop("test") if "test" in others else others.pop("val")
    training = others["train"]
    _check_classes(folder, training)
    _refuse_alike(folder, dict.fromkeys([*training, *tests, *others.get("val", {})]))
    labels = {name: label for label, name in enumerate(training)}
    for part in (tests, others.get("val", {})):
        strange = next((name for name in part if name not in labels), None)
        if strange is not None:
            raise InputError(f"class {strange} of {folder} has images to test or validate, but none to train")
    lacking = [name for name in labels if name not in tests]
    if lacking:
        raise InputError(
            f"class {lacking[0]} of {folder} has no test image ({len(lacking)} of its {len(labels)} classes have none)"
        )
    train: list[Labelled] = []
    val = [(path, labels[name]) for name, paths in others.get("val", {}).items() for path in paths]
    for name, paths in training.items():
        validated, trained = ([], list(paths)) if "val" in others else _share(paths, drawing.val_share, drawing)
        if not trained:
            raise InputError(f"class {name} of {folder} has {len(paths)} image to train and validate, and 2 are needed")
        train += [(path, labels[name]) for path in trained]
        val += [(path, labels[name]) for path in validated]
    tested = [(path, labels[name]) for name, paths in tests.items() for path in paths]
    return _task(training, train, val, tested, drawing)


def _task(
    classes: Iterable[str], train: list[Labelled], val: list[Labelled], test: list[Labelled], drawing: Drawing
) -> OwnTask:
    splits = {"train800": train, "val200": val, "train800val200": train + val, "test": test}
    # by digest: the first images of a split are a fair part of it
    ordered = {name: tuple(sorted(part, key=lambda image: drawing.order(image[0]))) for name, part in splits.items()}
    return OwnTask(tuple(classes), ordered)


def listed_task(folder: Path) -> VTABTask:
    """The task of a folder with VTAB-1K's split files, whatever its name.

    Raises:
        InputError: A line is wrong, or there are less than two classes or names than classes.
    """
    parts = {name: read_split(folder, name, _MOST_CLASSES) for name in SPLITS if (folder / f"{name}.txt").is_file()}
    classes = 1 + max(max(split.labels) for split in parts.values())
    if named := len(class_names(folder)):
        if classes > named:
            raise InputError(f"{folder / 'classes.txt'} names {named} classes, but a label is {classes - 1}")
        classes = named
    if classes < 2:
        raise InputError(f"{folder} has one class: there is nothing to tell apart")
    sizes = {name: len(split) for name, split in parts.items() if name != "test"}
    return VTABTask(_name_of(folder), "other", classes, len(parts["test"]) if "test" in parts else 0, sizes)


def _name_of(folder: Path) -> str:
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def _images(folder: Path, base: Path, remedy: str) -> tuple[dict[str, list[str]], list[Path]]:
    """Class -> paths relative to `folder`, of the folders in `base` that hold images at any depth; the other folders."""
    found, empty = {}, []
    for place in _class_folders(base):
        paths = [path.relative_to(folder).as_posix() for path in image_files(place)]
        for path in paths:
            check_path(f"image in {folder}: its path", path)
        if paths:
            found[place.name] = sorted(paths)
        else:
            empty.append(place)
    _refuse_alike(folder, found)
    if not found:
        raise MissingInputError(f"{base} holds no images that are sorted by class: {remedy}")
    return found, empty


def _entries(base: Path) -> list[Path]:
    """What is in a folder, sorted; hidden entries are passed over."""
    try:
        return sorted(entry for entry in base.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"the folder {base} cannot be read ({error.strerror}): make it readable") from None


def _class_folders(base: Path) -> list[Path]:
    """The folders in `base`, sorted; hidden ones are passed over.

    Raises:
        InputError: `base` cannot be read, or a link leads to a folder around it or to one that is there already: its
            images would have two labels.
    """
    entries = _entries(base)
    lost = next((entry for entry in entries if entry.is_symlink() and not entry.exists()), None)
    if lost is not None:
        raise InputError(f"{lost} is a link that leads nowhere: put the folder itself there, or remove the link")
    places = [entry for entry in entries if entry.is_dir()]
    real = {place.resolve(): place for place in places if not place.is_symlink()}
    for place in (place for place in places if place.is_symlink()):
        target = place.resolve()
        if base.resolve().is_relative_to(target):
            raise InputError(f"the class folder {place} is a link to {target}, which holds it: remove the link")
        if real.setdefault(target, place) is not place:
            raise InputError(f"the class folders {real[target]} and {place} are one: remove the link")
    return places


def _refuse_alike(folder: Path, classes: Iterable[str]) -> None:
    """Names that other systems, or a reader, take for one."""
    known: dict[str, str] = {}
    for name in classes:
        other = known.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise InputError(
                f"the classes {shown(other)} and {shown(name)} of {folder} differ in case or spelling only: rename one of "
                "them, or put their images together"
            )


def _check_classes(folder: Path, images: Mapping[str, list[str]]) -> None:
    if len(images) < 2:
        only = next(iter(images))
        if only.casefold() in PART_OF:
            raise InputError(
                f"{folder} has the folder {only} alone: beside train/CLASS there must be test/CLASS or val/CLASS, or "
                "folders of classes and nothing else"
            )
        raise InputError(f"{folder} has one class, {shown(only)}: there is nothing to tell apart")


def _share(paths: Iterable[str], share: float, drawing: Drawing, keep: int = 0) -> tuple[list[str], list[str]]:
    """A share of `paths`, at least one, and the others, at least `keep`."""
    ordered = sorted(paths, key=drawing.order)
    count = max(1, min(round(len(ordered) * share), len(ordered) - keep))
    return ordered[:count], ordered[count:]
