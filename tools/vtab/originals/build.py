"""Write a task in the layout in common use from a data set that was read into pools."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from eva_lightning.errors import InputError, MissingInputError, unknown
from eva_lightning.files import write_text
from eva_lightning.reading import in_short, reading
from eva_lightning.threads import ordered_map
from eva_lightning.vision.data.tasks import get_task
from tools.vtab.originals import ORIGINALS, REFUSED
from tools.vtab.originals.pool import Encoded, Original, Pool
from tools.vtab.originals.rules import slices
from tools.vtab.tfds_order import tfds_order


def require_original(task: str) -> Original:
    """How `task` is made.

    Raises:
        InputError: No such task, or it cannot be made from its original data; says why.
    """
    get_task(task)
    if task in REFUSED:
        raise InputError(
            f"{task} cannot be built from its original data: {REFUSED[task]}; take it from the archive (--archive)"
        )
    if task not in ORIGINALS:
        raise InputError(unknown("task with original data", task, ORIGINALS))
    return ORIGINALS[task]


def build_task(
    original: Original,
    folder: str | Path,
    root: str | Path,
    *,
    workers: int = 1,
    advance: Callable[[str, int, int], None] | None = None,
    take: tuple[int, int] = (800, 200),
) -> None:
    """Make ``root/<task>``: images under ``images/{train800,val200,test}`` and the four split files.

    Image files are taken over as they are (linked where the file system can, else copied), pixels become PNG. The
    folder appears under its name when it is complete; safe to interrupt; the same call continues.

    Args:
        original: What to make.
        folder: Folder that holds ``original.needs``.
        root: Folder for the task folders, created if needed.
        workers: Threads.
        advance: Called with the task, the number of images written so far and their total.
        take: Training and validation images (other numbers for tests).

    Raises:
        MissingInputError: The data is not there, or not whole.
        InputError: The data has another number of examples than the published one, so its subsets would be others.
        FileExistsError: The task folder exists.
    """
    target = Path(root) / original.task
    if target.exists():
        raise FileExistsError(f"{target} is there already: move it away to have it built anew")
    source = Path(folder).expanduser()
    pools = _load(original, source)
    part = target.with_name(f".{original.task}.part")
    sizes = {split: len(pool.keys) for split, pool in pools.items()}
    chosen = {
        name: (pools[piece.split], piece.of(tfds_order(piece.split, pools[piece.split].keys)))
        for name, piece in slices(original.rule, sizes, take, original.test).items()
    }
    total = sum(len(indices) for _, indices in chosen.values())
    lines: dict[str, list[str]] = {}
    done = 0
    for name, (pool, indices) in chosen.items():
        images = part / "images" / name
        images.mkdir(parents=True, exist_ok=True)
        written = ordered_map(_writer(pool, indices, images, source), range(len(indices)), workers)
        lines[name] = []
        for index, file in zip(indices, written, strict=True):
            lines[name].append(f"images/{name}/{file} {pool.labels[index]}")
            done += 1
            if advance is not None:
                advance(original.task, done, total)
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, content in lines.items():
        write_text(part / f"{name}.txt", "\n".join(content) + "\n")
    part.replace(target)


def _load(original: Original, folder: Path) -> dict[str, Pool]:
    needs = f"{original.task} needs {' and '.join(original.needs)} in {folder}, whole"
    try:
        with reading(folder):
            pools = original.load(folder)
    except InputError as error:
        # the reason is the cause's; torchvision reports missing and damaged data by RuntimeError
        reason = error if error.__cause__ is None else in_short(error.__cause__)
        raise MissingInputError(f"{needs} ({reason}): {original.hint}") from error
    for split, expected in original.sizes.items():
        if len(pools[split].keys) != expected:
            raise InputError(
                f"{original.task}: the {split} split in {folder} has {len(pools[split].keys)} examples where the "
                f"published data has {expected}, so VTAB's images cannot be told: {original.hint}"
            )
    return pools


def _writer(pool: Pool, indices: Sequence[int], folder: Path, source: Path) -> Callable[[int], str]:
    def write(position: int) -> str:
        """Write the image at `position` of the slice, where it is missing; gives its file name."""
        with reading(source, "its images cannot be taken from it"):
            image = pool.image(indices[position])
        suffix = image.suffix.lower() if isinstance(image, Path | Encoded) else ".png"
        file = folder / f"{position:06d}{suffix}"
        if file.exists():
            return file.name
        temporary = file.with_name(f".{file.name}.part")
        temporary.unlink(missing_ok=True)
        if isinstance(image, Path):
            _link(image, temporary)
        elif isinstance(image, Encoded):
            temporary.write_bytes(image.data)
        else:
            PillowImage.fromarray(np.ascontiguousarray(image)).save(temporary, format="PNG")
        temporary.replace(file)
        return file.name

    return write


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(strict=True), target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
