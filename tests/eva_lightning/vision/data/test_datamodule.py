from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from eva_lightning.vision.data.datamodule import NORMALIZATIONS, VTAB1K, EpochShuffle
from tests.eva_lightning.vision.fakes import make_task


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_task(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("cached", [True, False])
def test_test_batches_are_torchvisions_in_file_order(tmp_path: Path, root: Path, cached: bool) -> None:
    data = VTAB1K(
        root, "kitti", image_size=16, batch_size=5, cache_dir=tmp_path / "cache" if cached else None, progress=False
    )
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [i % 4 for i in range(12)]
    reference = v2.Compose(
        [
            v2.Resize((16, 16), interpolation=v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torch.cat([images for images, _ in batches])
    for index in range(12):
        expected = reference(Image.open(root / f"kitti/images/test_{index:03d}.jpg"))
        torch.testing.assert_close(images[index], expected)


def test_no_normalisation_leaves_pixels_in_the_unit_interval(root: Path) -> None:
    data = VTAB1K(root, "kitti", image_size=16, normalization="none", progress=False)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert 0 <= images.min() < images.max() <= 1


def test_training_order_is_a_permutation_by_seed_and_epoch() -> None:
    sampler = EpochShuffle(100, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    other = EpochShuffle(100, seed=4)
    assert list(other) != first
    assert list(other) != list(sampler)


def test_loaders_leave_the_global_random_state_alone(root: Path) -> None:
    data = VTAB1K(root, "kitti", image_size=16, progress=False)
    data.setup("fit")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_tuning_protocol_never_shows_test_images(root: Path) -> None:
    data = VTAB1K(root, "kitti", split="train800", image_size=16, progress=False)
    data.setup("fit")
    assert data.validates
    assert len(data.train_dataloader().dataset) == 16  # type: ignore[arg-type]
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert loader.dataset.split.name == "val200"


def test_train800_can_be_tested_on_test(root: Path) -> None:
    data = VTAB1K(root, "kitti", split="train800", evaluation="test", image_size=16, progress=False)
    data.setup("fit")
    data.setup("test")
    assert not data.validates
    assert len(data.train_dataloader().dataset) == 16  # type: ignore[arg-type]
    assert data.test_dataloader().dataset.split.name == "test"  # type: ignore[attr-defined]
    assert data.predict_dataloader().dataset.split.name == "test"  # type: ignore[attr-defined]


def test_pixels_are_normalised_as_torch_does_it(root: Path) -> None:
    data = VTAB1K(root, "kitti", image_size=16, progress=False)
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    images, labels = dataset.__getitems__([5, 0, 5])  # type: ignore[attr-defined]
    assert labels.tolist() == [1, 0, 1]
    raw = torch.from_numpy(dataset.pixels)[[5, 0, 5]]  # type: ignore[attr-defined]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    torch.testing.assert_close(images, (raw.float() / 255 - mean) / std, rtol=0, atol=1e-6)


def test_final_protocol_validates_nothing(root: Path) -> None:
    data = VTAB1K(root, "kitti", image_size=16, progress=False)
    assert not data.validates
    assert data.val_dataloader() == []


def test_single_items(root: Path) -> None:
    data = VTAB1K(root, "kitti", image_size=16, progress=False)
    data.setup("fit")
    image, label = data.train_dataloader().dataset[2]
    assert image.shape == (3, 16, 16)
    assert label.item() == 2


def test_loader_processes_give_the_same(root: Path) -> None:
    found = []
    for workers in (0, 1):
        data = VTAB1K(root, "kitti", image_size=16, workers=workers, progress=False)
        data.setup("test")
        found.append(np.concatenate([images.numpy() for images, _ in data.test_dataloader()]))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("image_size", 0, "image_size must be a whole number of at least 1, got 0"),
        ("batch_size", -1, "batch_size must be a whole number of at least 1, got -1"),
        ("workers", -1, "workers must be a whole number of at least 0, got -1"),
        ("normalization", "imagnet", "unknown normalization 'imagnet': did you mean imagenet"),
    ],
)
def test_bad_options(root: Path, option: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VTAB1K(root, "kitti", **{option: value})  # type: ignore[arg-type]
