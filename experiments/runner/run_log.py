"""Where log records go: to the terminal and to a ``log.txt``, for as long as something runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eva_lightning.output import Screen

_LOGGERS = ("experiments", "eva_lightning", "tools", "lightning.pytorch", "lightning.fabric", "py.warnings")
_LOGGER = logging.getLogger("experiments.runner")


class _File(logging.FileHandler):
    """On a full disk, records are lost without a word: what is being done will say so itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def _is_for_the_screen(record: logging.LogRecord) -> bool:
    return not record.name.startswith("lightning") and record.exc_info is None


@contextmanager
def logging_to(file: Path, terminal: bool = True) -> Iterator[None]:
    """Send our log records to the terminal, if `terminal`; these, Lightning's and warnings to `file`.

    An exception that passes is written to `file` with its traceback.
    """
    written = _File(file, encoding="utf-8")
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [written]
    if terminal:
        screen = Screen(warnings_apart=False)
        screen.addFilter(_is_for_the_screen)
        handlers.append(screen)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers = list(handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logging.captureWarnings(True)
    try:
        with _known_warnings_ignored(), _noting_exceptions():
            yield
    finally:
        logging.captureWarnings(False)
        for logger, own, level, propagate in before:
            logger.handlers = own
            logger.setLevel(level)
            logger.propagate = propagate
        written.close()


@contextmanager
def _noting_exceptions() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _LOGGER.error("%s: %s", type(error).__name__, error, exc_info=True)
        raise


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        # images come from memory: more loader processes would slow it down
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # resuming
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.")
        yield
