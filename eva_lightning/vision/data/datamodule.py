"""Labelled images, and VTAB-1K, as a LightningDataModule: checked folder, decoded once, batches ``(images, labels)``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from eva_lightning.errors import check_choice, check_number
from eva_lightning.vision.data.image_cache import cached_images, decode_all
from eva_lightning.vision.data.images import image_damage, load_image
from eva_lightning.vision.data.split_files import Split
from eva_lightning.vision.data.splits import TaskData, open_task

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

#: Per-channel mean and standard deviation for pixels in [0, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class SplitDataset(Dataset[Batch]):
    """Normalised images and labels of one split.

    A list of indices is fetched as one ready batch, so that a batch is normalised in one vectorised step and needs no
    collation.

    Args:
        split: Files and labels.
        image_size: Height and width of the images, in pixels.
        pixels: Decoded images ``(n, 3, image_size, image_size)`` uint8, or None to decode at each access.
        normalization: ``"imagenet"`` or ``"none"`` (pixels in [0, 1]).
    """

    def __init__(
        self,
        split: Split,
        image_size: int,
        pixels: npt.NDArray[np.uint8] | None = None,
        normalization: str = "imagenet",
    ) -> None:
        self.split = split
        self.image_size = image_size
        # a plain array over the same memory: rows of np.memmap are slower to make
        self.pixels = None if pixels is None else np.asarray(pixels)
        self.labels = torch.tensor(split.labels)
        mean, std = (np.array(values) for values in NORMALIZATIONS[normalization])
        # (pixel / 255 - mean) / std as one product and one sum
        self._scale = (1 / (255 * std)).astype(np.float32).reshape(3, 1, 1)
        self._shift = (-mean / std).astype(np.float32).reshape(3, 1, 1)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Batch:
        """Image ``(3, H, W)`` fp32 and label ``()`` int64."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images ``(B, 3, H, W)`` fp32 and labels ``(B,)`` int64."""
        # NumPy, image by image: an image stays in the processor's cache between the two steps, and NumPy's large arrays
        # lie on huge pages. A batch of 64 took 5 ms on one core, by torch's operations on the whole batch 23 ms.
        images = np.empty((len(indices), 3, self.image_size, self.image_size), dtype=np.float32)
        for image, index in zip(images, indices, strict=True):
            np.multiply(self._raw(index), self._scale, out=image)
            image += self._shift
        return torch.from_numpy(images), self.labels[list(indices)]

    def _raw(self, index: int) -> npt.NDArray[np.uint8]:
        if self.pixels is not None:
            raw: npt.NDArray[np.uint8] = self.pixels[index]
            return raw
        return load_image(self.split.folder / self.split.paths[index], self.image_size)


class EpochShuffle(Sampler[int]):
    """A permutation that depends on seed and epoch alone, so that a resumed run continues the same order."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        # SeedSequence mixes the two numbers; seed + epoch would give run 0's second epoch to run 1's first
        state = int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)[0]) >> 1
        generator = torch.Generator().manual_seed(state)
        yield from torch.randperm(self.n, generator=generator).tolist()


class LabelledImages(L.LightningDataModule):
    """Splits of labelled images as loaders: decoded once, batches ``(images, labels)``.

    Training batches are shuffled by a generator of their own, evaluation batches come in the order of their split, no
    augmentation (EVA paper, section D.2). Decoded images are kept as uint8 in a checksummed file that is mapped into
    memory (:mod:`~eva_lightning.vision.data.image_cache`): later epochs and the other runs of a search decode nothing.

    Args:
        data: What to train and to evaluate on.
        image_size: Images are squeezed to ``image_size x image_size`` pixels, bicubic.
        batch_size: Images per training batch; the last batch of an epoch may be smaller.
        eval_batch_size: Images per evaluation batch; ``batch_size`` for None.
        normalization: ``"imagenet"`` or ``"none"``.
        workers: Decoding threads; loader processes where images are decoded at each access.
        cache_dir: Folder for decoded images. None keeps the training images in memory and decodes evaluation images
            at each access.
        seed: Seed of the training order.
        progress: Show a progress bar while decoding.
    """

    def __init__(
        self,
        data: TaskData,
        *,
        image_size: int,
        batch_size: int,
        eval_batch_size: int | None,
        normalization: str,
        workers: int,
        cache_dir: str | Path | None,
        seed: int,
        progress: bool,
    ) -> None:
        super().__init__()
        for name, value in (
            ("image_size", image_size),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
        ):
            if value is not None:
                check_number(name, value, at_least=1, whole=True)
        check_number("workers", workers, at_least=0, whole=True)
        check_choice("normalization", normalization, NORMALIZATIONS)
        self.data = data
        self.image_size = image_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.normalization = normalization
        self.workers = workers
        self.cache_dir = cache_dir
        self.seed = seed
        self.progress = progress
        self._datasets: dict[str, SplitDataset] = {}

    @property
    def num_classes(self) -> int:
        """Number of labels of the task."""
        return self.data.task.classes

    @property
    def validates(self) -> bool:
        """Whether there are images to evaluate on after every epoch that are not test images."""
        return self.data.validation is not None

    def setup(self, stage: str) -> None:
        """Decode what `stage` needs, once."""
        data = self.data
        validation = [] if data.validation is None else [data.validation]
        wanted = {"fit": [data.train, *validation], "validate": validation}.get(stage, [data.evaluation])
        if not self._datasets:
            for sentence in data.warnings:
                logger.warning("%s", sentence)
        for split in wanted:
            if split.name not in self._datasets:
                pixels = self._decoded(split)
                self._datasets[split.name] = SplitDataset(split, self.image_size, pixels, self.normalization)

    def check_images(self) -> None:
        """Make sure that every image can be decoded, before hours of training; most are decoded for it, once.

        Raises:
            InputError: One cannot.
        """
        for stage in ("fit", "test"):
            self.setup(stage)
        for dataset in self._datasets.values():
            files = [dataset.split.folder / path for path in dataset.split.paths] if dataset.pixels is None else []
            for file in files:
                if image_damage(file) == "broken":
                    load_image(file, self.image_size)  # says why

    def _decoded(self, split: Split) -> npt.NDArray[np.uint8] | None:
        if self.cache_dir is not None:
            images = cached_images(split, self.image_size, self.cache_dir, self.workers, self.progress)
            if images is not None:
                return images
        if split.name == self.data.train.name:
            images = np.empty((len(split), 3, self.image_size, self.image_size), dtype=np.uint8)
            decode_all(split, self.image_size, images, self.workers, self.progress)
            return images
        return None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled training batches: images ``(B, 3, H, W)`` fp32, labels ``(B,)`` int64."""
        return self._loader(self.data.train, self.batch_size, EpochShuffle(len(self.data.train), self.seed))

    def val_dataloader(self) -> Any:
        """The images that validate, in the order of their split; no loader where there are none."""
        return [] if self.data.validation is None else self._loader(self.data.validation, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The evaluation split (the test images, or in tuning those that validate) in its order."""
        return self._loader(self.data.evaluation, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The evaluation split in its order."""
        return self.test_dataloader()

    def _loader(self, split: Split, batch_size: int, sampler: Sampler[int] | None = None) -> DataLoader[Batch]:
        dataset = self._datasets[split.name]
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=as_fetched,
            num_workers=self.workers if dataset.pixels is None else 0,
            # an own generator: otherwise every pass over the loader would advance the global random state
            generator=torch.Generator().manual_seed(self.seed),
        )


class VTAB1K(LabelledImages):
    """One VTAB-1K task from the folder layout ``<root>/<task>/{train800,val200,train800val200,test}.txt``.

    The folder is checked when the object is made; images are decoded once, in ``setup``. With ``split="train800"`` the
    validation loader gives val200 after every epoch; the test loader gives val200 too, so test images never take part
    in tuning. What is not described here: :class:`LabelledImages`.

    Args:
        root: Folder that holds the task folders.
        task: Task name.
        split: ``"train800val200"`` (evaluated on test) or ``"train800"`` (evaluated on val200).
        limit_train: Use only the first so many training images (quick trials).
        limit_test: Use only the first so many evaluation images (quick trials).
        evaluation: ``"val200"`` or ``"test"`` instead of what `split` is evaluated on; train800 can be tested too.
        image_size, batch_size, eval_batch_size, normalization, workers, cache_dir, seed, progress: See
            :class:`LabelledImages`.

    Attributes:
        data: The checked :class:`~eva_lightning.vision.data.splits.TaskData`, with its warnings.

    Raises:
        MissingInputError: Something of the folder is missing.
        InputError: Unknown name, bad line, label gap, or a size below 1.
    """

    def __init__(
        self,
        root: str | Path,
        task: str,
        *,
        split: str = "train800val200",
        image_size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        normalization: str = "imagenet",
        workers: int = 0,
        cache_dir: str | Path | None = None,
        limit_train: int | None = None,
        limit_test: int | None = None,
        evaluation: str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__(
            open_task(root, task, split, limit_train, limit_test, evaluation),
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            normalization=normalization,
            workers=workers,
            cache_dir=cache_dir,
            seed=seed,
            progress=progress,
        )


def as_fetched(batch: Any) -> Batch:
    """A collation for :class:`SplitDataset`, which fetches a whole batch at once."""
    fetched: Batch = batch
    return fetched
