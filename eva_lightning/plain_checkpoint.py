"""A checkpoint with adapters made into one without, for processes that never import eva_lightning.

    python -m eva_lightning.plain_checkpoint last.ckpt plain.ckpt --module my_package.training:MyModule

The adapters are merged into the weights; ``MyModule.load_from_checkpoint("plain.ckpt")`` and
``trainer.test(MyModule(), ckpt_path="plain.ckpt")`` load it with Lightning alone. What is needed to go on training
(optimizers, callbacks) is left out, as with ``save_weights_only``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from eva_lightning.adapters import merge_and_unload
from eva_lightning.checkpoint import KEY
from eva_lightning.errors import InputError, MissingInputError
from eva_lightning.files import replacing
from eva_lightning.namespaces import lightning_classes
from eva_lightning.torch_files import load_plain

#: What Lightning and its averaging callbacks need to go on training; it is of the parameters that adapters had.
TRAINING = (
    "optimizer_states", "lr_schedulers", "callbacks", "MixedPrecision", "current_model_state", "averaging_state"
)  # fmt: skip


def write_plain_checkpoint(
    cls: type[pl.LightningModule],
    checkpoint_path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    **kwargs: Any,
) -> Path:
    """Merge the adapters of a checkpoint into its weights, so that Lightning alone loads it.

    Args:
        cls: the class of the module that was trained, or for LightningCLI in subclass mode the one above it.
        checkpoint_path: written while training under an EVAInitCallback.
        target: the file to write, all or nothing; replaced if it exists.
        kwargs: further arguments for ``cls.load_from_checkpoint``.

    Returns:
        The file written.

    Raises:
        MissingInputError: there is no such checkpoint.
        InputError: it has no adapters, or `cls` makes LoRA layers itself, which plain weights do not fit; or see
            :func:`eva_lightning.adapters.merge_and_unload`.
    """
    checkpoint = _read(Path(checkpoint_path), kwargs.get("weights_only", True))
    description = checkpoint[KEY]
    if description.get("built_with"):
        raise InputError(
            f"{cls.__name__} makes LoRA layers itself, which weights without adapters do not fit: load the checkpoint "
            "in a process that imports eva_lightning"
        )
    module = cls.load_from_checkpoint(os.fspath(checkpoint_path), **{"map_location": "cpu", **kwargs})
    merge_and_unload(module)
    plain = {key: value for key, value in checkpoint.items() if key != KEY and key not in TRAINING}
    plain["state_dict"] = module.state_dict()
    with replacing(target) as temporary:
        torch.save(plain, temporary)
        cls.load_from_checkpoint(os.fspath(temporary), **{"map_location": "cpu", **kwargs})  # raises if it does not fit
    return Path(target)


def _read(file: Path, weights_only: bool) -> dict[str, Any]:
    if not file.is_file():
        raise MissingInputError(f"there is no checkpoint {file}")
    try:
        found = load_plain(file) if weights_only else torch.load(file, map_location="cpu", weights_only=False)
    except InputError:
        raise
    except Exception as error:  # of many types: zip, pickle and torch each have their own
        raise InputError(f"{file} is damaged or no checkpoint: {type(error).__name__} when reading it") from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise InputError(f"{file} is no checkpoint of a LightningModule: it has no state_dict")
    if not isinstance(found.get(KEY), dict):
        raise InputError(f"{file} has no adapters of eva_lightning: Lightning loads it as it is")
    return found


def command_line(args: Sequence[str] | None = None) -> int:
    """Convert one file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eva_lightning.plain_checkpoint",
        description="Merge the adapters of a checkpoint into its weights, for processes without eva_lightning.",
    )
    parser.add_argument("checkpoint", help="written while training under an EVAInitCallback")
    parser.add_argument("target", help="file to write")
    parser.add_argument(
        "--module", required=True, metavar="PACKAGE.MODULE:CLASS", help="where the LightningModule's class is"
    )
    given = parser.parse_args(args)
    try:
        print(f"wrote {write_plain_checkpoint(_class(given.module), given.checkpoint, given.target)}")
    except InputError as error:
        parser.error(str(error))
    return 0


def _class(name: str) -> type[pl.LightningModule]:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None) if module and attribute else None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the user's module imports
        raise InputError(f"--module {name!r}: there is no module {error.name!r} here") from error
    if not (isinstance(found, type) and issubclass(found, lightning_classes("core.module", "LightningModule"))):
        raise InputError(f"--module must be a LightningModule as PACKAGE.MODULE:CLASS, got {name!r}")
    return found


if __name__ == "__main__":
    sys.exit(command_line())
