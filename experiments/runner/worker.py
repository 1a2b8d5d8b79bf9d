"""What a process does before its first run and after every run."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eva_lightning.errors import InputError

_NOISY = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero", "bitsandbytes", "timm")


@dataclass(frozen=True)
class WorkerOptions:
    """How processes work; nothing of it changes results but `threads`, in the last bits.

    Attributes:
        threads: CPU threads of torch in each process.
        modules: Imported before the first run, so that no run's time contains it.
        start: Called before the first run; a function of a module's top level, or a partial of one.
    """

    threads: int = 1
    modules: tuple[str, ...] = ()
    start: Callable[[], None] | None = None


_PREPARED: list[WorkerOptions] = []


def prepare(options: WorkerOptions) -> None:
    """Make this process ready for runs; the second time nothing happens."""
    if _PREPARED:
        return
    _PREPARED.append(options)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for name in options.modules:
        importlib.import_module(name)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(options.threads)
    if options.start is not None:
        options.start()
    # what is imported stays: collecting garbage after each run need not look at it
    gc.collect()
    gc.freeze()


def import_backend(backend: str, package: str, extra: str, *submodules: str) -> Any:
    """The package that a backend needs, with these submodules.

    Raises:
        InputError: It is not installed.
    """
    try:
        for name in submodules:
            importlib.import_module(f"{package}.{name}")
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            f"the {backend} backend needs the package {package}, which is not installed: pip install -e '.[{extra}]' "
            "in the checkout, or use --backend local"
        ) from error


def free_memory() -> None:
    """Give a run's memory back: a trainer and its module hold each other, and a GPU may be shared with other runs."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
