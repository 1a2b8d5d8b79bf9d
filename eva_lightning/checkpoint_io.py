"""Lightning's checkpoints, written all or nothing, verified when read, with the one before kept.

Lightning writes a checkpoint to the system's temporary folder and moves it from there, which is a copy where that is
another file system: a kill or a full disk in the middle of it leaves a part, in place of the only checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from eva_lightning.errors import DamagedFileError
from eva_lightning.files import replacing, temporary_name
from eva_lightning.sealed import SealedWriter, damage, previous


class AtomicCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer: no checkpoint is lost by a kill, a full disk or a power failure.

    A checkpoint takes its name when it is whole and on the disk. It carries a checksum, which stock ``torch.load``
    and Lightning overlook, and is compared with it when it is loaded. Where a checkpoint takes the place of one of the
    same name, such as ``last.ckpt``, that one is kept beside it as ``last.ckpt.previous``.

    Checkpoints at a URL (``s3://...``) and sharded ones are written and read as without this plugin.

    Example::

        trainer = L.Trainer(plugins=[AtomicCheckpointIO()])

    Args:
        keep_previous: Keep the checkpoint that another of the same name replaces.
    """

    def __init__(self, keep_previous: bool = True) -> None:
        self.keep_previous = keep_previous

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            DiskFullError, UnwritableError: It cannot be written; what was there stays.
            TypeError: `storage_options` are given.
        """
        if storage_options is not None or _is_url(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary:
            save_sealed(checkpoint, temporary)
            if self.keep_previous:
                _keep(Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, as Lightning does, after comparing it with its checksum.

        Raises:
            DamagedFileError: It is not as it was written.
        """
        file = Path(path)
        reason = damage(file) if not _is_url(path) and file.is_file() else None
        if reason is not None:
            instead = f"resume from {previous(file).name}" if previous(file).is_file() else "resume from another"
            raise DamagedFileError(f"the checkpoint {path} is damaged ({reason}): {instead}")
        return super().load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, and the one kept beside it."""
        super().remove_checkpoint(path)
        if not _is_url(path):
            previous(Path(path)).unlink(missing_ok=True)


def save_sealed(content: Any, file: Path) -> None:
    """``torch.save`` with a checksum; the caller sees to it that the file appears whole (:func:`files.replacing`)."""
    with file.open("wb") as stream:
        writer = SealedWriter(stream)
        torch.save(content, writer)  # type: ignore[arg-type]
        writer.end()


def _keep(file: Path) -> None:
    """Give `file` its second name; it keeps the first until another takes that."""
    if not file.is_file():
        return
    link = file.with_name(temporary_name(uuid.uuid4().hex))
    try:
        os.link(file, link)
    except OSError:  # a file system without: for a moment there is only the second name
        file.replace(previous(file))
        return
    link.replace(previous(file))
    with contextlib.suppress(FileNotFoundError):
        link.unlink()  # nothing was renamed where both were the same file already


def _is_url(path: str | Path) -> bool:
    return "://" in str(path) or "::" in str(path)
