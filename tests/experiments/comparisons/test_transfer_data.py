from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from eva_lightning.vision.data.datamodule import SplitDataset
from eva_lightning.vision.data.split_files import Split
from experiments.comparisons import transfer_data
from tests.eva_lightning.vision.fakes import make_task


def images(counts: Sequence[int]) -> Split:
    """Names of images, so many per class."""
    named = [(f"images/c{label}/{index}.jpg", label) for label, n in enumerate(counts) for index in range(n)]
    return Split("all", Path("nowhere"), tuple(path for path, _ in named), tuple(label for _, label in named))


def test_halves_share_no_class_and_no_image() -> None:
    counts = [400, 300, *range(12, 112)]
    found = transfer_data.split_halves(images(counts), seed=3)
    parts = [found.pretraining, found.held_out, found.train, found.test]
    paths = [path for part in parts for path in part.paths]
    assert len(paths) == len(set(paths)) == sum(counts)
    assert set(found.train.paths) == {*found.tuning.paths, *found.validation.paths}
    assert (len(found.tuning), len(found.validation), found.classes) == (800, 200, (51, 51))
    classes = [{path.split("/")[1] for path in part.paths} for part in parts]
    assert classes[0] == classes[1]
    assert classes[2] == classes[3]
    assert not classes[0] & classes[2]
    # neighbours in size are on different sides, so that the halves are about as large
    assert len({"c0", "c1"} & classes[0]) == 1
    first = len(found.pretraining) + len(found.held_out)
    assert abs(first - (sum(counts) - first)) <= 100 + 50
    # no class gives more than half of its images
    train, test = Counter(found.train.labels), Counter(found.test.labels)
    assert all(0 < train[label] <= test[label] for label in range(51))
    assert max(train.values()) - 1 <= sorted(train.values())[-2] <= max(train.values())


def test_a_split_is_that_of_its_seed() -> None:
    some = images([20] * 10)
    reordered = Split("all", some.folder, some.paths[::-1], some.labels[::-1])
    assert transfer_data.split_halves(some, 1, 40, 10) == transfer_data.split_halves(reordered, 1, 40, 10)
    assert transfer_data.split_halves(some, 1, 40, 10) != transfer_data.split_halves(some, 2, 40, 10)


def test_validation_images_are_like_the_others() -> None:
    # one class far larger than the others: its images must not gather at one end of the order
    for seed in range(3):
        found = transfer_data.split_halves(images([4000, 4000, *([40] * 98)]), seed)
        share = Counter(found.validation.labels)
        assert len(share) > 40
        expected = Counter(found.train.labels)[0] / 5
        assert abs(share[0] - expected) < 4 * math.sqrt(expected)


def test_crops_at_full_size_are_the_image_or_its_mirror() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(32, 3, 12, 12, generator=generator)
    cropped = transfer_data.random_crops(pixels, 12, generator, least_area=1.0)
    same = torch.isclose(cropped, pixels, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(cropped, pixels.flip(3), atol=1e-5).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 4 < int(same.sum()) < 28
    # on a ramp, a crop of a quarter of the area spans half of the values, and stays inside
    ramp = torch.arange(64.0).expand(200, 3, 64, 64).contiguous()
    quarter = transfer_data.random_crops(ramp, 32, generator, least_area=0.25)
    spans = quarter.amax((1, 2, 3)) - quarter.amin((1, 2, 3))
    assert spans.min() > 0.4 * 64
    assert spans.max() < 64
    assert quarter.min() >= 0
    assert quarter.max() <= 63


def test_jitter_of_nothing_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 5, 5, generator=generator)
    torch.testing.assert_close(transfer_data.random_jitter(pixels, generator, most=0.0), pixels)
    grey = pixels.mean(1, keepdim=True).expand_as(pixels)
    jittered = transfer_data.random_jitter(grey, generator)
    torch.testing.assert_close(jittered[:, 0], jittered[:, 2])  # grey stays grey
    assert not torch.allclose(jittered, grey)


def test_an_image_with_two_labels_or_none_there(tmp_path: Path) -> None:
    folder = make_task(tmp_path, "caltech101", classes=4)
    lines = (folder / "test.txt").read_text().splitlines()
    (folder / "test.txt").write_text("\n".join([*lines, "images/train800_000.jpg 3"]) + "\n")
    with pytest.raises(ValueError, match=r"train800_000\.jpg is listed with the labels 0 and 3"):
        transfer_data.read_images(tmp_path)
    (folder / "test.txt").write_text("\n".join([*lines, "images/gone.jpg 3"]) + "\n")
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg is missing \(1 of 37 are\)"):
        transfer_data.read_images(tmp_path)


def test_batches_come_in_the_order_of_the_seed() -> None:
    split = Split("some", Path("nowhere"), tuple(map(str, range(10))), tuple(range(10)))
    data = SplitDataset(split, 4, np.zeros((10, 3, 4, 4), dtype=np.uint8))
    orders = [
        torch.cat([labels for _, labels in transfer_data.TransferData(data, 4, seed).train_dataloader()]).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(10))
    assert np.diff(orders[0]).tolist() != [1] * 9
