"""A folder of images without labels, as minibatches."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import DataLoader

from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.vision.data.datamodule import Batch, EpochShuffle, SplitDataset, as_fetched
from eva_lightning.vision.data.decoding import image_files
from eva_lightning.vision.data.split_files import Split


def folder_loader(
    folder: str | Path, image_size: int, batch_size: int, *, normalization: str = "imagenet", seed: int = 0
) -> DataLoader[Batch]:
    """Minibatches of the images in `folder` and below it, prepared as VTAB-1K's are, in an order drawn by `seed`.

    Images are decoded as they are asked for. Every label is 0.

    Raises:
        MissingInputError: There is no such folder.
        InputError: No image is in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise MissingInputError(f"there is no folder of images {folder}")
    files = [str(file.relative_to(root)) for file in image_files(root)]
    if not files:
        raise InputError(f"{folder} and the folders below it hold no image")
    split = Split(root.name, root, tuple(files), (0,) * len(files))
    images = SplitDataset(split, image_size, normalization=normalization)
    return DataLoader(images, batch_size, sampler=EpochShuffle(len(files), seed), collate_fn=as_fetched)
