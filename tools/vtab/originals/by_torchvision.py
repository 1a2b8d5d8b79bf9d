"""Tasks whose original data torchvision reads. Their keys in TFDS:

- ``cifar`` (``cifar100`` 3.0.2) and ``svhn`` (``svhn_cropped`` 3.0.0): number of the image in its file
- ``dtd`` (``dtd`` 3.0.1, first of the ten official partitions): class, slash, file name
- ``oxford_flowers102`` (2.1.*) and ``oxford_iiit_pet`` (3.2.0): file name
- ``eurosat`` (``eurosat/rgb`` 2.0.0): class, underscore, file name (which has the class again)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.vtab.originals.pool import Original, Pool
from tools.vtab.originals.rules import Rule


def _cifar(data: Any) -> Pool:
    """The 32x32 images with their fine labels, in the order of the files."""
    return Pool(range(len(data.data)), data.targets, data.data.__getitem__)


def _svhn(data: Any) -> Pool:
    """The 32x32 images; digit 0, stored as 10, has label 0."""
    images = data.data.transpose(0, 2, 3, 1)
    return Pool(range(len(images)), data.labels.tolist(), images.__getitem__)


def _dtd(data: Any) -> Pool:
    return _files(data._image_files, data._labels, lambda file: f"{file.parent.name}/{file.name}")


def _flowers(data: Any) -> Pool:
    return _files(data._image_files, data._labels, lambda file: file.name)


def _pets(data: Any) -> Pool:
    return _files(data._images, data._labels, lambda file: file.name)


def _eurosat(data: Any) -> Pool:
    return _files((path for path, _ in data.samples), data.targets, lambda file: f"{file.parent.name}_{file.name}")


def _files(paths: Iterable[str | Path], labels: Sequence[int], key: Callable[[Path], str]) -> Pool:
    files = [Path(path) for path in paths]
    return Pool([key(file) for file in files], labels, files.__getitem__)


def _load(
    dataset: str, splits: Mapping[str, Mapping[str, Any]], pool: Callable[[Any], Pool], folder: Path
) -> dict[str, Pool]:
    from torchvision import datasets  # takes seconds that only these tasks need

    return {split: pool(getattr(datasets, dataset)(str(folder), **chosen)) for split, chosen in splits.items()}


def _original(
    task: str,
    rule: Rule,
    needs: tuple[str, ...],
    dataset: str,
    splits: Mapping[str, Mapping[str, Any]],
    pool: Callable[[Any], Pool],
    sizes: Mapping[str, int],
    hint: str | None = None,
) -> Original:
    """A task from the class `dataset` of torchvision, given the arguments in `splits` for each split of TFDS."""
    load = partial(_load, dataset, splits, pool)
    return Original(
        task, rule, needs, load, sizes, hint or f"torchvision.datasets.{dataset}(DIR, download=True) gets it"
    )


_TRAIN_VAL_TEST = {"train": {"split": "train"}, "validation": {"split": "val"}, "test": {"split": "test"}}

ORIGINALS = (
    _original(
        "cifar", "A90", ("cifar-100-python",), "CIFAR100", {"train": {"train": True}, "test": {"train": False}}, _cifar,
        {"train": 50000, "test": 10000},
    ),
    _original(
        "dtd", "B", ("dtd/dtd",), "DTD", _TRAIN_VAL_TEST, _dtd, {"train": 1880, "validation": 1880, "test": 1880}
    ),
    _original(
        "oxford_flowers102", "B", ("flowers-102",), "Flowers102", _TRAIN_VAL_TEST, _flowers,
        {"train": 1020, "validation": 1020, "test": 6149},
    ),
    _original(
        "oxford_iiit_pet", "A80", ("oxford-iiit-pet",), "OxfordIIITPet",
        {"train": {"split": "trainval"}, "test": {"split": "test"}}, _pets, {"train": 3680, "test": 3669},
    ),
    _original(
        "svhn", "A90", ("train_32x32.mat", "test_32x32.mat"), "SVHN",
        {"train": {"split": "train"}, "test": {"split": "test"}}, _svhn, {"train": 73257, "test": 26032},
        "torchvision.datasets.SVHN(DIR, 'train', download=True), and the same with 'test', get it",
    ),
    _original("eurosat", "C", ("eurosat/2750",), "EuroSAT", {"train": {}}, _eurosat, {"train": 27000}),
)  # fmt: skip
