"""What a run's identity says about the code that makes it, so that a rerun finds nothing stale."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from eva_lightning.files import digest, file_digest
from experiments.report.page import versions

ROOT = Path(__file__).resolve().parents[2]

#: Changes of these change no figure.
_PICTURES = ("eva_lightning/plots.py", "eva_lightning/analysis.py")


def source_digest(sources: Iterable[str], without: Iterable[str], packages: Iterable[str]) -> str:
    """Digest of source files and of the versions of libraries.

    Args:
        sources: Files and folders, relative to the repository.
        without: Those below them that do not matter.
        packages: Names of the libraries whose behaviour the figures depend on.
    """
    unused = {ROOT / name for name in (*without, *_PICTURES)}
    files = {file for name in sources for file in _python_files(ROOT / name)}
    kept = sorted(file for file in files if unused.isdisjoint((file, *file.parents)))
    return digest([{str(file.relative_to(ROOT)): file_digest(file) for file in kept}, versions(packages)])


def _python_files(path: Path) -> Iterable[Path]:
    return path.rglob("*.py") if path.is_dir() else (path,)
