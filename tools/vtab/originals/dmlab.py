"""DMLab frames, from the TFRecord files that VTAB published; TFDS ``dmlab`` 2.0.1, key: file name in the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.reading import reading
from tools.vtab.originals.pool import Encoded, Image, Original, Pool
from tools.vtab.originals.tfrecord import parse_example, record, record_spans


def load(folder: Path) -> dict[str, Pool]:
    """The 360x480 JPEGs of ``dmlab/dmlab-{train,validation,test}.tfrecord*``."""
    return {split: _pool(sorted((folder / "dmlab").glob(f"dmlab-{split}.tfrecord*"))) for split in _SIZES}


def _pool(files: Sequence[Path]) -> Pool:
    if not files:
        raise MissingInputError("a split has no .tfrecord file")
    places: list[tuple[Path, int, int]] = []
    keys: list[bytes] = []
    labels: list[int] = []
    for file in files:
        with reading(file, "download it again"), file.open("rb") as stream:
            for start, length in record_spans(stream):
                example = parse_example(record(stream, start, length))
                keys.append(_bytes(example["filename"][0]))
                labels.append(int(example["label"][0]))
                _bytes(example["image"][0])
                places.append((file, start, length))

    def image(index: int) -> Image:
        file, start, length = places[index]
        with reading(file, "download it again"), file.open("rb") as stream:
            return Encoded(_bytes(parse_example(record(stream, start, length))["image"][0]), ".jpg")

    return Pool(keys, labels, image)


def _bytes(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise InputError("not an example of DMLab: a number where bytes are expected")
    return value


_SIZES = {"train": 65550, "validation": 22628, "test": 22735}

ORIGINALS = (
    Original(
        task="dmlab",
        rule="B",
        needs=("dmlab",),
        load=load,
        sizes=_SIZES,
        hint="unpack dmlab.tar.gz of VTAB there, into a folder dmlab",
    ),
)
