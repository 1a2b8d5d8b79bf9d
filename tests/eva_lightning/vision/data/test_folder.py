from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eva_lightning.vision.data.folder import folder_loader

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def test_images_at_any_depth_are_normalised_and_shuffled_by_the_seed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    colours = [10, 60, 110, 160, 210]
    for i, colour in enumerate(colours):
        place = tmp_path / ("a/b" if i % 2 else ".") / f"{i}.{'PNG' if i == 0 else 'png'}"
        Image.fromarray(np.full((5, 7, 3), colour, dtype=np.uint8)).save(place)
    (tmp_path / "notes.txt").write_text("no image")
    first, again, other = (folder_loader(tmp_path, 8, 2, seed=seed) for seed in (0, 0, 4))
    images = torch.cat([x for x, _ in first])
    assert images.shape == (5, 3, 8, 8)
    found = (images.mean((2, 3)) * STD + MEAN) * 255
    assert sorted(found[:, 0].round().int().tolist()) == colours
    torch.testing.assert_close(found.std(1), torch.zeros(5), rtol=0, atol=1e-3)
    assert [len(labels) for _, labels in first] == [2, 2, 1]
    assert torch.equal(images, torch.cat([x for x, _ in again]))
    assert not torch.equal(images, torch.cat([x for x, _ in other]))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder of images .*nowhere"):
        folder_loader(tmp_path / "nowhere", 8, 2)
    with pytest.raises(ValueError, match="hold no image"):
        folder_loader(tmp_path, 8, 2)
