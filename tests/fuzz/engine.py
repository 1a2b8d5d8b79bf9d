"""Feed a reader damaged files and judge what comes out.

An input holds where the reader returns what was written, or ends in an :class:`~eva_lightning.errors.InputError`. It is
a finding where another exception comes out, something else loads than was written, or it takes too long or too much
memory.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eva_lightning.errors import InputError
from eva_lightning.sealed import CHECKSUM, sealed
from tests.fuzz.mutations import damaged, damaged_json

SECONDS = 10
MEMORY = 512 * 2**20
#: Beyond what the process has: an allocation that fails is a finding too.
ADDRESS_SPACE = 8 * 2**30


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        name: Of the reader.
        make: Writes valid files into an empty folder.
        read: Reads them; what comes out is compared.
        checked: Nothing but what was written may load. False for formats of others that have no checksum.
        files: Pattern of the files to damage.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    checked: bool = True
    files: str = "**/*"


@dataclass
class Report:
    """What came out of a reader's inputs."""

    name: str
    inputs: int = 0
    equal: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class _Late(BaseException):
    pass


def fuzz(reader: Reader, seconds: float, seed: int, save: Path | None = None, most: int | None = None) -> Report:
    """Damage the reader's files for some time.

    Args:
        reader: The reader.
        seconds: How long.
        seed: Of the damages: the same inputs in the same order.
        save: Folder for the inputs that are findings, made smaller where that is possible.
        most: Inputs at most.
    """
    report = Report(reader.name)
    until = time.monotonic() + seconds
    with _scratch() as folder, _bounds(), _quiet():
        reader.make(folder)
        files = sorted(path for path in folder.glob(reader.files) if path.is_file())
        originals = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        expected = reader.read(folder)
        _restore(folder, originals)
        while time.monotonic() < until and (most is None or report.inputs < most):
            rng = random.Random(f"{seed} {reader.name} {report.inputs}")
            report.inputs += 1
            path = rng.choice(files)
            content, crafted = _input(originals, path, rng)
            kind = _try(reader, folder, path, content, expected, crafted, report)
            if kind is not None:
                _note(reader, folder, originals, path, content, expected, crafted, kind, report, save, seed)
            _restore(folder, originals)
    return report


def _input(originals: dict[Path, bytes], path: Path, rng: random.Random) -> tuple[bytes, bool]:
    """A damaged content, and whether somebody made it on purpose, with a checksum that fits or without any."""
    data = originals[path]
    if path.suffix == ".json" and rng.random() < 0.5:
        document = damaged_json(data, rng)
        how = rng.random()
        if isinstance(document, dict) and how < 0.7:
            document.pop(CHECKSUM, None)
            document = document if how < 0.2 else sealed(document)
        with contextlib.suppress(ValueError):
            return json.dumps(document, indent=None if how < 0.2 else 1).encode(), how < 0.7
    return damaged(data, rng, [other for other in originals.values() if other is not data][:3]), False


def _try(
    reader: Reader, folder: Path, path: Path, content: bytes, expected: Any, crafted: bool, report: Report | None
) -> str | None:
    """What is wrong with what the reader does, or None."""
    _put(path, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    outcome = "refused"
    try:
        found = reader.read(folder)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcome = "equal"
        if reader.checked and not crafted and not same(found, expected):
            return "silently different"
    except InputError as error:
        if _out_of_memory(error):
            return "asks for too much memory"
        if len(str(error)) > 2000 or "\n" in str(error):
            return f"no sentence: {str(error)[:80]!r}"
    except _Late:
        return f"takes more than {SECONDS} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {str(error)[:80]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
        return "takes too much memory"
    if report is not None:
        setattr(report, outcome, getattr(report, outcome) + 1)
    return None


def _out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _note(
    reader: Reader,
    folder: Path,
    originals: dict[Path, bytes],
    path: Path,
    content: bytes,
    expected: Any,
    crafted: bool,
    kind: str,
    report: Report,
    save: Path | None,
    seed: int,
) -> None:
    report.kinds[kind] += 1
    if report.kinds[kind] > 3:
        return
    report.findings.append(f"{kind} (seed {seed}, input {report.inputs - 1}, {path.name}, {len(content)} bytes)")
    if save is not None and not kind.startswith("takes"):
        start = time.monotonic()
        size = max(1, len(content) // 2)
        while size and time.monotonic() - start < 5:  # leave out halves, quarters, ... as long as the finding stays
            for at in range(0, len(content), size):
                _restore(folder, originals)
                shorter = content[:at] + content[at + size :]
                if _try(reader, folder, path, shorter, expected, crafted, None) == kind:
                    content = shorter
                    break
            else:
                size //= 2
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / f"{reader.name}-{seed}-{report.inputs - 1}-{path.name}").write_bytes(content)


def _restore(folder: Path, originals: dict[Path, bytes]) -> None:
    """Put the folder back as it was."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path in original.parents for original in originals):
                shutil.rmtree(path)
        elif path not in originals:
            path.unlink()
    for path, content in originals.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            _put(path, content)


def _put(path: Path, content: bytes) -> None:
    # a new file each time: readers remember what they have verified by its number and time
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def same(one: Any, two: Any) -> bool:
    """Whether two results are equal to the bit; NaN equals NaN."""
    if isinstance(one, dict):
        return isinstance(two, dict) and list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return isinstance(two, np.ndarray) and one.dtype == two.dtype and np.array_equal(one, two)
    if isinstance(one, float) and isinstance(two, float) and math.isnan(one):
        return math.isnan(two)
    return type(one) is type(two) and bool(one == two)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _bounds() -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Late

    handler = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
