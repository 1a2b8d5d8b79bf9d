"""Any folder of photographs as a LightningDataModule."""

from __future__ import annotations

from pathlib import Path

from eva_lightning.vision.data.datamodule import LabelledImages
from eva_lightning.vision.data.own_tasks import Drawing
from eva_lightning.vision.data.splits import open_folder


class ImageFolderDataModule(LabelledImages):
    """A folder of images that are sorted by class, for a Trainer and :class:`~eva_lightning.vision.ImageClassifier`.

    Layouts, the first that fits: VTAB-1K's split files; a split file ``splits.csv`` (columns path, label and perhaps
    split) or ``train.txt`` and ``test.txt`` (lines ``path label``); ``train/CLASS/`` and ``test/CLASS/`` or
    ``val/CLASS/``; ``CLASS/``. What the folder does not divide is drawn class by class, by `split_seed`: the same folder
    gives the same parts everywhere. ``fit`` trains on the training images and evaluates those that validate after
    every epoch, ``test`` and ``predict`` read the test images.

    The folder is checked when the object is made: unreadable folders, missing images, links that lead nowhere, images
    in two parts; copies of training images among those to test are warned of. Images are decoded in ``setup``: a damaged one is named; a JPEG that breaks off is filled in with
    grey, with a warning. Everything else: :class:`~eva_lightning.vision.data.datamodule.LabelledImages`.

    Example::

        data = ImageFolderDataModule("photographs")
        module = ImageClassifier("vit_tiny_patch16_224", data.num_classes)
        L.Trainer(max_epochs=10, callbacks=[EVAInitCallback(rho=2)]).fit(module, data)

    Args:
        folder: The folder.
        split_file: A split file that lies elsewhere or has another name; its paths are relative to `folder`.
        test_share: Share of every class that is held out for the test, where the folder does not say.
        val_share: Share of the others of every class that validate, where the folder does not say.
        split_seed: Another seed draws other images.
        hold_out: Keep the images that validate out of the training; False: train on them too, and validate nothing.
        evaluation: ``"test"``, or ``"val"``: ``test`` and ``predict`` read the images that validate, so that test images
            take no part in choosing a learning rate.
        image_size, batch_size, eval_batch_size, normalization, workers, cache_dir, seed, progress: See
            :class:`~eva_lightning.vision.data.datamodule.LabelledImages`.

    Attributes:
        data: The checked :class:`~eva_lightning.vision.data.splits.TaskData`, with its warnings.
        class_names: In the order of the labels.

    Raises:
        MissingInputError: Folder, split file or image missing.
        InputError: No layout that is known, less than two classes, a class with too few images, an image in two parts, or
            a value out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split_file: str | Path | None = None,
        test_share: float = 0.25,
        val_share: float = 0.2,
        split_seed: int = 0,
        hold_out: bool = True,
        evaluation: str = "test",
        image_size: int = 224,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        normalization: str = "imagenet",
        workers: int = 0,
        cache_dir: str | Path | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        file = None if split_file is None else Path(split_file).expanduser()
        drawing = Drawing(test_share, val_share, split_seed, file)
        super().__init__(
            open_folder(folder, drawing, hold_out=hold_out, evaluation=evaluation),
            image_size=image_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            normalization=normalization,
            workers=workers,
            cache_dir=cache_dir,
            seed=seed,
            progress=progress,
        )
        self.class_names = self.data.class_names
