"""Decoded images on disk: one ``.npy`` file of uint8 pixels per split and image size, read as a memory map.

VTAB-1K trains 30 epochs on 1,000 images, and a search trains hundreds of times on the same ones: JPEGs are decoded
once. The file name holds a fingerprint of the image list, sizes and modification times, so changed data never
meets an old cache. Behind the pixels, the file holds a CRC-32 of each image: what a failing disk or an interrupted copy
changed is found when the file is opened, and decoded again. Of many processes that want the same cache at once, one
decodes and the others wait; files appear under their final name only when complete.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import track

from eva_lightning.arrays import header, map_array
from eva_lightning.errors import DiskFullError, InputError, UnwritableError
from eva_lightning.files import format_bytes, free_bytes, is_disk_full, replacing
from eva_lightning.threads import ordered_map
from eva_lightning.vision.data.images import load_image
from eva_lightning.vision.data.split_files import Split
from eva_lightning.vision.data.splits import files_digest

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 2
_ROOM_TO_LEAVE = 256 * 2**20
_CHECKSUMS = b"crc32 of images\n"
_SECONDS_WITHOUT_A_WORD = 2.0
_BYTES_WITHOUT_A_BAR = 2**30

#: Cache files whose checksums this process has compared -> size, modification time and inode they had then.
_verified: dict[Path, tuple[int, int, int]] = {}


class _CannotWrite(Exception):
    """The cache file cannot be written; the message says why."""


def fingerprint(split: Split, image_size: int) -> str:
    """16 hexadecimal digits that change when the list of images, a file's size or time, or the resolution changes."""
    return files_digest(split.folder, split.paths, f"{_FORMAT} {image_size}\n")[:16]


def decoded(
    split: Split, image_size: int, workers: int = 0, progress: bool = True
) -> Generator[npt.NDArray[np.uint8], None, None]:
    """The images of `split` one by one, ``(3, image_size, image_size)`` uint8, decoded on `workers` threads.

    The result does not depend on `workers`. A progress bar is shown in a terminal.

    Raises:
        InputError: An image cannot be decoded.
    """
    files = [split.folder / path for path in split.paths]
    images = ordered_map(lambda file: load_image(file, image_size), files, workers)
    yield from _bar(images, f"decoding {split.folder.name} {split.name}", len(files), progress)


def decode_all(
    split: Split, image_size: int, out: npt.NDArray[np.uint8], workers: int = 0, progress: bool = True
) -> None:
    """Decode every image of `split` into `out` ``(n, 3, image_size, image_size)``; see :func:`decoded`."""
    for index, image in enumerate(decoded(split, image_size, workers, progress)):
        out[index] = image


def cached_images(
    split: Split, image_size: int, cache_dir: str | Path, workers: int = 0, progress: bool = True
) -> npt.NDArray[np.uint8] | None:
    """The decoded images of `split` from the cache, which is made first where it is missing or damaged.

    A cache file is compared with its checksums once per process, again where it was changed since: about 0.05 s for
    the 1,000 training images at 224 pixels, a hundredth of the time they take to decode.

    Args:
        split: Images wanted.
        image_size: Height and width, in pixels.
        cache_dir: Folder for cache files, created if needed.
        workers: Threads that decode and compare.
        progress: Show a progress bar while decoding.

    Returns:
        Read-only memory map ``(n, 3, image_size, image_size)`` uint8, or None where the cache cannot be written: too
        little room, a read-only folder (a warning says which).

    Raises:
        InputError: An image cannot be decoded.
    """
    shape = (len(split), 3, image_size, image_size)
    folder = Path(cache_dir)
    file = folder / f"{split.folder.name}-{split.name}-{image_size}px-{fingerprint(split, image_size)}.npy"
    images = _open(file, shape, workers, progress)
    if images is not None:
        return images
    try:
        with _alone(file):
            images = _open(file, shape, workers, progress, warn=True)
            if images is not None:
                return images
            _require_room(folder, int(np.prod(shape, dtype=np.int64)))
            _write(file, split, image_size, workers, progress)
    except _CannotWrite as reason:
        logger.warning("no image cache for %s %s: %s", split.folder.name, split.name, reason)
        return None
    return _open(file, shape, workers, progress, warn=True)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold the lock of a cache file. It is the kernel's: the end of a process, however it ends, sets it free."""
    lock = FileLock(file.with_name(f".{file.name}.lock"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_SECONDS_WITHOUT_A_WORD)
        except Timeout:
            logger.info("another process is decoding %s: waiting for it", file.name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise _CannotWrite(f"{file.parent} cannot be locked ({_reason(error)})") from None
    try:
        yield
    finally:
        lock.release()


def _require_room(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed + _ROOM_TO_LEAVE:
        raise _CannotWrite(f"it needs {format_bytes(needed)} and {folder} has {format_bytes(free)} free")


def _write(file: Path, split: Split, image_size: int, workers: int, progress: bool) -> None:
    """Decode `split` into `file`. To be called with its lock held."""
    checksums = np.zeros(len(split), dtype="<u4")
    shape = (len(split), 3, image_size, image_size)
    try:
        with (
            replacing(file) as temporary,
            temporary.open("wb", buffering=0) as stream,
            closing(decoded(split, image_size, workers, progress)) as images,
        ):
            _put(stream, header(shape, np.dtype(np.uint8)), file)
            for index, image in enumerate(images):
                checksums[index] = zlib.crc32(image.data)
                _put(stream, image.data, file)
            _put(stream, _trailer(checksums), file)
    except (DiskFullError, UnwritableError) as error:
        raise _CannotWrite(f"{file.parent} cannot be written ({_reason(error.__cause__ or error)})") from None


def _put(stream: FileIO, data: bytes | memoryview, file: Path) -> None:
    # plain writes, not a memory map of the new file: on a full disk, writing to a map kills the process
    rest = memoryview(data).cast("B")
    with _writing(file):
        while rest:
            rest = rest[stream.write(rest) :]


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _CannotWrite(f"{file.parent} cannot be written ({_reason(error)})") from None


def _reason(error: BaseException) -> str:
    if is_disk_full(error):
        return "the disk is full"
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)


def _trailer(checksums: npt.NDArray[np.uint32]) -> bytes:
    """What follows the pixels: a word, the checksum of each image, and one of these checksums."""
    body = _CHECKSUMS + checksums.astype("<u4").tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little")


def _trailer_length(n_images: int) -> int:
    return len(_CHECKSUMS) + 4 * n_images + 4


def _open(
    file: Path, shape: tuple[int, ...], workers: int, progress: bool, warn: bool = False
) -> npt.NDArray[np.uint8] | None:
    """The images in `file`, or None where it is missing or damaged; `warn` of damage and delete the file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    try:
        images = map_array(file, shape, np.dtype(np.uint8), trailer=_trailer_length(shape[0]))
    except (InputError, OSError):
        images = np.empty(0, dtype=np.uint8)
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    known = _verified.get(file) == state
    if images.shape == shape and (known or _intact(file, images, workers, progress)):
        _verified[file] = state
        return images
    if warn:
        logger.warning("image cache %s is damaged: decoding the images again", file.name)
        del images
        file.unlink(missing_ok=True)
    return None


def _intact(file: Path, images: npt.NDArray[np.uint8], workers: int, progress: bool) -> bool:
    """Whether every image has the checksum that the file holds of it."""
    with file.open("rb") as stream:
        stream.seek(-_trailer_length(len(images)), os.SEEK_END)
        trailer = stream.read()
    expected = np.frombuffer(trailer, dtype="<u4", count=len(images), offset=len(_CHECKSUMS))
    if trailer != _trailer(expected):
        return False
    found = ordered_map(zlib.crc32, images, workers)
    shown = progress and images.nbytes > _BYTES_WITHOUT_A_BAR
    for checksum, image_checksum in zip(
        _bar(found, f"checking {file.stem}", len(images), shown), expected, strict=True
    ):
        if checksum != image_checksum:
            return False
    return True


def _bar(steps: Iterator[T], what: str, total: int, shown: bool) -> Iterator[T]:
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        return steps
    return iter(track(steps, what, total=total, transient=True, console=console))
