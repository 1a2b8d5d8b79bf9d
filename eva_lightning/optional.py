"""Packages that only some of it needs."""

from __future__ import annotations

import importlib
from typing import Any

from eva_lightning.errors import MissingPackageError


def needed(module: str, what: str, extra: str) -> Any:
    """Import a module that is or needs an optional package.

    Args:
        module: Its whole name.
        what: What needs it, for the message: ``"EVAState.to_pandas"``.
        extra: The extra of this project that brings it.

    Raises:
        MissingPackageError: A package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        if package == __name__.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed: pip install 'eva_lightning[{extra}]'"
        ) from error
