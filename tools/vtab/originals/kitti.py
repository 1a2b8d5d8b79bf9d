"""KITTI (distance to the nearest vehicle), from the object benchmark and its development kit; TFDS ``kitti`` 3.1.0.

Key: file name. TFDS divides by video: a tenth of the videos each for test and validation, drawn by NumPy with seed 123
from the sorted names; the development kit says which image comes from which video.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.reading import read_text, reading
from tools.vtab.originals.pool import Original, Pool

_VEHICLES = ("Car", "Van", "Truck")
_EDGES = np.array([-100.0, 8.0, 20.0, 999.0], dtype=np.float32)
_NO_VEHICLE = 1000.0
_TYPE, _Z = 0, 13
#: Bytes of a list of 7,481 images, with room.
_MOST_BYTES = 16 * 2**20


def label(annotations: str) -> int:
    """Interval of the smallest distance of a car, van or truck, open below and closed above; 3 where there is none."""
    rows = [line.split() for line in annotations.splitlines() if line.strip()]
    nearest = np.float32(min((float(row[_Z]) for row in rows if row[_TYPE] in _VEHICLES), default=_NO_VEHICLE))
    return int(np.flatnonzero(nearest > _EDGES).max())


def divide(videos: list[str]) -> dict[str, list[int]]:
    """TFDS split -> numbers of its images, from the name of each image's video."""
    names = sorted(set(videos))
    tenth = max(1, len(names) // 10)
    random = np.random.RandomState(123)
    test = {str(name) for name in random.choice(names, tenth, replace=False)}
    rest = [name for name in names if name not in test]
    validation = {str(name) for name in random.choice(rest, tenth, replace=False)}
    split_of = {name: "test" if name in test else "validation" if name in validation else "train" for name in names}
    found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for number, video in enumerate(videos):
        found[split_of[video]].append(number)
    return found


def load(folder: Path) -> dict[str, Pool]:
    """The images of ``Kitti/raw/training/image_2``, which is where torchvision's ``Kitti`` puts them."""
    raw = folder / "Kitti" / "raw"
    lines = _devkit(raw, "train_mapping.txt").splitlines()
    with reading(raw / "train_mapping.txt"):
        videos = [lines[_position(number, lines)].split()[1] for number in _devkit(raw, "train_rand.txt").split(",")]
    return {split: _pool(raw / "training", numbers) for split, numbers in divide(videos).items()}


def _position(number: str, lines: list[str]) -> int:
    position = int(number) - 1
    if not 0 <= position < len(lines):
        raise ValueError(f"line {position + 1} is asked for, and there are {len(lines)}")
    return position


def _devkit(raw: Path, name: str) -> str:
    """A file of the folder ``mapping`` of the development kit, unpacked or not."""
    for folder in (raw, raw / "devkit", raw / "devkit_object"):
        if (folder / "mapping" / name).is_file():
            return read_text(folder / "mapping" / name)
    archive = raw / "devkit_object.zip"
    if not archive.is_file():
        raise MissingInputError(f"neither {archive} nor {raw / 'mapping' / name} is there")
    with reading(archive), zipfile.ZipFile(archive) as opened:
        member = next((info for info in opened.infolist() if info.filename.endswith(f"mapping/{name}")), None)
        if member is None or member.file_size > _MOST_BYTES:
            raise InputError(f"{archive} holds no mapping/{name} as KITTI's has")
        return opened.read(member).decode()


def _label(file: Path) -> int:
    text = read_text(file)
    with reading(file):
        return label(text)


def _pool(training: Path, numbers: list[int]) -> Pool:
    files = [training / "image_2" / f"{number:06d}.png" for number in numbers]
    labels = [_label(training / "label_2" / f"{number:06d}.txt") for number in numbers]
    return Pool([file.name for file in files], labels, files.__getitem__)


ORIGINALS = (
    Original(
        task="kitti",
        rule="B",
        needs=("Kitti/raw/training", "Kitti/raw/devkit_object.zip"),
        load=load,
        sizes={"train": 6347, "validation": 423, "test": 711},
        hint="torchvision.datasets.Kitti(DIR, download=True) gets the images, and devkit_object.zip of KITTI goes to "
        "Kitti/raw",
    ),
)
