"""The demo's photographs out of UC Merced Land Use: ``python -m tools.ucmerced_bundle --source FOLDER``.

Yi Yang and Shawn Newsam, "Bag-of-Visual-Words and Spatial Extensions for Land-Use Classification", ACM SIGSPATIAL
GIS 2010: 21 classes of 100 aerial photographs, 256 x 256 pixels at one foot per pixel, cut out of the USGS National
Map Urban Area Imagery, which is in the public domain. The folder given holds a folder per class, as the authors'
archive does (``Images``), or VTAB-1K's layout (``train800val200.txt`` and ``test.txt``, whose membership is kept).

Written is every second class in alphabetical order, ten of them, each with images to train, to validate and to test,
as ``train/CLASS``, ``val/CLASS`` and ``test/CLASS``, which ``python -m experiments.vtab`` reads as a task of its own.
Images are drawn by the digest of their names, so that the same folder gives the same bundle everywhere, and
near-duplicates of an image that is taken already (neighbouring cuts of one photograph) are passed over.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import replacing, writable_folder, write_text
from eva_lightning.reading import in_short
from eva_lightning.vision.data.decoding import FORMATS, open_image, read_image_file
from eva_lightning.vision.data.images import to_rgb
from eva_lightning.vision.data.split_files import read_split
from experiments.runner.cli import in_terminal
from experiments.runner.ending import leave
from experiments.runner.settings import Role, check_settings, option, parse_settings

PROG = "python -m tools.ucmerced_bundle"
ROOT = Path(__file__).resolve().parents[1]
#: The data set's classes.
ALL_CLASSES = (
    "agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral", "denseresidential", "forest",
    "freeway", "golfcourse", "harbor", "intersection", "mediumresidential", "mobilehomepark", "overpass", "parkinglot",
    "river", "runway", "sparseresidential", "storagetanks", "tenniscourt",
)  # fmt: skip
CLASSES = ALL_CLASSES[0:20:2]
#: Split -> images per class.
SIZES: Mapping[str, int] = {"train": 20, "val": 20, "test": 30}
SOURCES = "SOURCES.md"
_SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png")
_QUALITY = 90
#: Two images whose hashes of 256 bits differ in at most so many are taken for the same piece of ground.
_NEAR = 20
_FITS = f"a folder for each of {len(ALL_CLASSES)} classes ({ALL_CLASSES[0]} to {ALL_CLASSES[-1]})"

_TEXT = """# {classes} classes of UC Merced Land Use, {pixels} x {pixels} pixels

Source: Yi Yang and Shawn Newsam, "Bag-of-Visual-Words and Spatial Extensions for Land-Use Classification", ACM
SIGSPATIAL International Conference on Advances in Geographic Information Systems (ACM GIS), 2010; the data set of its
authors at the University of California, Merced. Please cite it where you use these images.

Licence: the photographs are cut out of the USGS National Map Urban Area Imagery, a work of the U.S. Geological
Survey, which is in the public domain. That they are smaller and of other files is our only change.

What is here: every second class in alphabetical order ({names}), of each {train} images to train, {val} to validate
(learning rates are chosen on them) and {test} to test. The names of the files are the data set's. This is a draw of
our own and no split of a benchmark: numbers compare with nothing that is published.

Made by `{prog}`, which draws by the digest of names and passes over near-duplicates. {read}

Images: {number}, {size} bytes, SHA-256 {digest} (of the sorted list of paths and SHA-256 of each file).
"""


@dataclass(frozen=True)
class Settings:
    """What to read and where to write."""

    source: str = option(MISSING, "folder of UC Merced Land Use: a folder per class, or VTAB-1K's layout", Role.PLACE)
    out: str = option(str(ROOT / "experiments" / "assets" / "ucmerced10"), "folder to make", Role.PLACE)
    pixels: int = option(70, "height and width of the images", Role.RESULT, at_least=14)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Candidates:
    """Files that a class may take, in the order of the draw: those for training and validation, and those for testing.

    Where no membership is given, both are all of them.
    """

    train: Sequence[Path]
    test: Sequence[Path]

    def of(self, split: str) -> Sequence[Path]:
        """Those for a split."""
        return self.test if split == "test" else self.train


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` and return its exit status."""
    description = (__doc__ or "").split("\n\n")[0]
    return in_terminal(lambda words: print(make(parse_settings(Settings, PROG, description, words))), args)


def make(settings: Settings) -> str:
    """Make the bundle; returns a sentence that says what it holds.

    Raises:
        InputError: The folder is not UC Merced's, a class has too few images, one is damaged or too small, or there is
            something at `out` already.
    """
    out = Path(settings.out)
    if out.exists():
        raise InputError(f"{out} exists: delete it, or choose another --out", setting="out")
    candidates, read = find_candidates(Path(settings.source))
    parent = writable_folder(out.parent)
    building = Path(tempfile.mkdtemp(dir=parent, prefix=".ucmerced-"))
    try:
        for name, image in _drawn(candidates, settings.pixels):
            _save(building / name, image)
        number, size, digest = bundle_facts(building)
        text = _TEXT.format(
            classes=len(CLASSES), names=", ".join(CLASSES), pixels=settings.pixels, prog=PROG, read=read, number=number,
            size=size, digest=digest, **SIZES,
        )  # fmt: skip
        paragraphs = (textwrap.fill(part, 118) for part in text.split("\n\n"))
        write_text(building / SOURCES, "\n\n".join(paragraphs) + "\n")
        building.chmod(0o755)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return f"{out}: {number} images, {size} bytes, SHA-256 {digest}"


def bundle_facts(folder: Path) -> tuple[int, int, str]:
    """Number, bytes and digest of the images in a bundle."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.jpg")}
    lines = [f"{name} {hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files)]
    return len(files), sum(map(len, files.values())), hashlib.sha256("".join(lines).encode()).hexdigest()


def find_candidates(source: Path) -> tuple[dict[str, Candidates], str]:
    """The images of every class, and a sentence about what was read.

    Raises:
        MissingInputError: There is no such folder, or not every class is in it.
        InputError: A split file cannot be read.
    """
    if not source.is_dir():
        raise MissingInputError(f"there is no folder {source}", setting="source")
    if (source / "test.txt").is_file():
        train, test = (_listed(source, split) for split in ("train800val200", "test"))
        number = sum(map(len, (*train.values(), *test.values())))
        how = "Training and validation images come from its train800val200.txt, test images from its test.txt."
    else:
        base = source / "Images" if (source / "Images").is_dir() else source
        train = test = {name: _in_order((base / name).glob("*")) for name in ALL_CLASSES if (base / name).is_dir()}
        number, how = sum(map(len, train.values())), "Which images train and which test was drawn."
    lacking = [name for name in ALL_CLASSES if not train.get(name) or not test.get(name)]
    if lacking:
        raise MissingInputError(f"{source} is not UC Merced Land Use, {_FITS}: it lacks images of {lacking[0]}")
    return {name: Candidates(train[name], test[name]) for name in CLASSES}, (
        f"It read a folder of {number} of the data set's {100 * len(ALL_CLASSES)} images. {how}"
    )


def _listed(source: Path, split: str) -> dict[str, list[Path]]:
    """Class -> images that a split file lists, in the order of the draw."""
    found: dict[str, list[Path]] = {}
    for path in read_split(source, split, len(ALL_CLASSES)).paths:
        found.setdefault(Path(path).parent.name, []).append(source / path)
    return {name: _in_order(paths) for name, paths in found.items()}


def _in_order(paths: Iterator[Path] | Sequence[Path]) -> list[Path]:
    """By the digests of class and name, without what is no image."""
    images = [path for path in paths if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")]
    return sorted(images, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.stem}".encode()).hexdigest())


def _drawn(candidates: Mapping[str, Candidates], pixels: int) -> Iterator[tuple[str, Image.Image]]:
    """Every image of the bundle, with its path in it."""
    taken: set[Path] = set()
    hashes: list[np.ndarray] = []
    for split, number in SIZES.items():
        for name, found in candidates.items():
            left = number
            for path in found.of(split):
                if not left:
                    break
                if path in taken:
                    continue
                image = _read(path, pixels)
                hash_ = difference_hash(image)
                if any((hash_ != other).sum() <= _NEAR for other in hashes):
                    continue
                taken.add(path)
                hashes.append(hash_)
                left -= 1
                yield f"{split}/{name}/{path.stem}.jpg", image.resize((pixels, pixels), Image.Resampling.LANCZOS)
            if left:
                raise InputError(
                    f"class {name} has {number - left} images for {split} that are no near-duplicates of others, and "
                    f"{number} are needed"
                )


def difference_hash(image: Image.Image) -> np.ndarray:
    """256 bits: whether each of 16 x 16 patches is darker than the next one in its row."""
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), dtype=np.int16)
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def _read(path: Path, pixels: int) -> Image.Image:
    data = read_image_file(path)
    try:
        image = to_rgb(open_image(data, (*FORMATS, "TIFF")))
    except Exception as error:  # Pillow reports damage by many kinds of exceptions
        raise InputError(f"image {path} cannot be decoded ({in_short(error)}): copy it again") from None
    if min(image.size) < pixels:
        raise InputError(f"image {path} has {image.width} x {image.height} pixels, and at least {pixels} are needed")
    return image


def _save(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    leave(main())
