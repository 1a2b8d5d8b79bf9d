"""Decoded images on disk: one ``.npy`` file of uint8 pixels per split and image size, read as a memory map.

VTAB-1K trains 30 epochs on 1,000 images, and a search trains hundreds of times on the same ones: JPEGs are decoded
once. The file name holds a fingerprint of the image list, sizes and modification times, so changed data never
meets an old cache. Files appear under their final name only when complete.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track

from .images import load_image
from .splits import Split

logger = logging.getLogger(__name__)

_FORMAT = 1
_ROOM_TO_LEAVE = 256 * 2**20


def fingerprint(split: Split, image_size: int) -> str:
    """16 hexadecimal digits that change when the list of images, a file's size or time, or the resolution changes."""
    digest = hashlib.sha256(f"{_FORMAT} {image_size}\n".encode())
    for path in split.paths:
        stat = (split.folder / path).stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def decode_all(
    split: Split, image_size: int, out: npt.NDArray[np.uint8], workers: int = 0, progress: bool = True
) -> None:
    """Decode every image of `split` into `out` ``(n, 3, image_size, image_size)``, on `workers` threads.

    The result does not depend on `workers`. A progress bar is shown in a terminal.

    Raises:
        ValueError: An image cannot be decoded.
    """
    files = [split.folder / path for path in split.paths]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        images: Iterator[npt.NDArray[np.uint8]] = pool.map(lambda file: load_image(file, image_size), files)
        try:
            steps = track(
                images,
                f"decoding {split.folder.name} {split.name}",
                total=len(files),
                transient=True,
                console=Console(stderr=True),
                disable=not progress,
            )
            for index, image in enumerate(steps):
                out[index] = image
        except BaseException:
            # without this, leaving the pool would first decode the images still queued
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def cached_images(
    split: Split, image_size: int, cache_dir: str | Path, workers: int = 0, progress: bool = True
) -> npt.NDArray[np.uint8] | None:
    """The decoded images of `split` from the cache, which is made first where it is missing or damaged.

    Args:
        split: Images wanted.
        image_size: Height and width, in pixels.
        cache_dir: Folder for cache files, created if needed.
        workers: Decoding threads.
        progress: Show a progress bar while decoding.

    Returns:
        Read-only memory map ``(n, 3, image_size, image_size)`` uint8, or None where the disk has too little room left
        (a warning says so).

    Raises:
        ValueError: An image cannot be decoded.
    """
    shape = (len(split), 3, image_size, image_size)
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{split.folder.name}-{split.name}-{image_size}px-{fingerprint(split, image_size)}.npy"
    images = _open(file, shape)
    if images is not None:
        return images
    needed = int(np.prod(shape, dtype=np.int64))
    free = shutil.disk_usage(folder).free
    if free < needed + _ROOM_TO_LEAVE:
        logger.warning(
            "no image cache for %s: it needs %.1f GB and %s has %.1f GB free",
            split.name,
            needed / 1e9,
            folder,
            free / 1e9,
        )
        return None
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=file.stem, suffix=".part")
    os.close(descriptor)
    try:
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        decode_all(split, image_size, out, workers, progress)
        out.flush()
        del out
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return _open(file, shape)


def _open(file: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
    if not file.is_file():
        return None
    try:
        images: npt.NDArray[np.uint8] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        images = np.empty(0, dtype=np.uint8)
    if images.shape != shape or images.dtype != np.uint8:
        logger.warning("image cache %s is damaged: decoding the images again", file.name)
        return None
    return images
