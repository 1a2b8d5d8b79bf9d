"""The digits are scikit-learn's, split and drawn as the data module says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from eva_lightning.vision.digits import (
    PIXEL_MAX,
    PIXEL_MEAN,
    PIXEL_STD,
    DigitsDataModule,
    draw_labels,
    load_digits_split,
    random_shift,
)


def test_digit_parts_are_disjoint_and_are_the_scans_of_scikit_learn() -> None:
    classes = (5, 6, 7, 8, 9)
    split = load_digits_split(classes)
    bunch = load_digits()
    parts = [part.tensors for part in (split.train, split.tune, split.test)]
    images = torch.cat([images for images, _ in parts])
    pixels = ((images * PIXEL_STD + PIXEL_MEAN) * PIXEL_MAX).round().squeeze(1).numpy()
    labels = torch.cat([labels for _, labels in parts]).numpy() + 5
    ours = sorted((label, image.tobytes()) for label, image in zip(labels, pixels.astype("f8"), strict=True))
    kept = np.isin(bunch.target, classes)
    theirs = sorted((t, i.tobytes()) for t, i in zip(bunch.target[kept], bunch.images[kept], strict=True))
    assert ours == theirs
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_labels_are_balanced_and_follow_the_seed() -> None:
    pool = load_digits_split((5, 6, 7, 8, 9)).train
    images, labels = draw_labels(pool, 52, seed=3).tensors
    assert labels.bincount().tolist() == [11, 11, 10, 10, 10]
    assert torch.equal(images, draw_labels(pool, 52, seed=3).tensors[0])
    assert not torch.equal(images, draw_labels(pool, 52, seed=4).tensors[0])


def test_batch_order_ignores_the_global_generator() -> None:
    def labels() -> list[int]:
        return [int(y) for _, batch in DigitsDataModule(n_labels=40, seed=1).train_dataloader() for y in batch]

    torch.manual_seed(0)
    first = labels()
    torch.rand(5)
    assert labels() == first


def test_shift_moves_the_image_by_whole_pixels() -> None:
    torch.manual_seed(0)
    images = torch.full((64, 1, 8, 8), -PIXEL_MEAN / PIXEL_STD)
    images[:, 0, 4, 3] = 1.0
    shifted = random_shift(images)
    places = {(int(r), int(c)) for _, _, r, c in (shifted == 1.0).nonzero()}
    assert (shifted == 1.0).sum() == 64
    assert places == {(r, c) for r in (3, 4, 5) for c in (2, 3, 4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_digits_split((5, 5)), "distinct digits"),
        (lambda: load_digits_split((5, 11)), "distinct digits"),
        (lambda: load_digits_split((5,), 0.5, 0.5), "stay below 1"),
        (lambda: DigitsDataModule(evaluate_on="train"), "unknown evaluate on 'train': choose from test, tune"),
        (lambda: DigitsDataModule(n_labels=4), "n_labels must be a whole number of at least 5, got 4"),
        (lambda: DigitsDataModule(n_labels=5000), "n_labels=5000 asks for 1000 images"),
    ],
)
def test_bad_data_settings_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
