"""The console script ``eva-lightning``: finds the commands, which are no part of the library, and hands them the line.

In a checkout they lie beside the library. A wheel holds them inside it (``checkout``, laid out like the checkout), as
``experiments`` is too common a name to claim in site-packages. They are found in this process and those it starts,
and nowhere else: ``import eva_lightning`` knows nothing of them.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_EXTRAS = "'eva_lightning[vision]' for images, 'eva_lightning[rl]' for robots"


def main(args: Sequence[str] | None = None) -> int:
    """Run ``eva-lightning ARGS`` (``sys.argv`` for None) and return its exit status."""
    _find_commands()
    importlib.import_module("experiments.runner.ending").quiet_while_starting(always=args is None)
    try:
        status: int = importlib.import_module("experiments.__main__").main(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "benchmarks", "eva_lightning", "experiments", "tools"):
            raise
        print(
            f"error: this needs the package {package}, which is not installed: pip install {_EXTRAS}", file=sys.stderr
        )
        return 2
    return status


def script() -> None:
    """:func:`main` as the process: it ends with the command's exit status."""
    status = main()
    importlib.import_module("experiments.runner.ending").leave(status)


def _find_commands() -> None:
    """Put the folder that holds ``experiments`` first on the path, also for Ray, SLURM and other child processes."""
    package = Path(__file__).resolve().parent
    inside = package / "checkout"
    folder = str(inside if inside.is_dir() else package.parent)
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    before = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *before])
