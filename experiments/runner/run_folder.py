"""A run is a folder: what it was asked to do, how far it got, what came out.

``config.yaml`` is written when a run starts and ``metrics.json`` when it ends, so their presence tells a finished run
from an interrupted one, and a config that differs tells that a name is taken.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from eva_lightning.errors import InputError

_CONTENTS = (
    "config.yaml", "metrics.json", "metrics.csv", "log.txt", "checkpoints", "adapter", "plots",
    "csv", "tensorboard", "wandb",
)  # fmt: skip
_STATE_FILES = ("eva_state.safetensors", "eva_state.json")
_LOGGERS = ("experiments", "eva_lightning", "lightning.pytorch", "py.warnings")


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; created by :meth:`start`.
        config: Everything the run was asked to do, as plain YAML values.
        incidental: Keys of `config` that do not change the result (where to write, how many workers).
    """

    def __init__(self, path: Path, config: Mapping[str, Any], incidental: tuple[str, ...] = ()) -> None:
        self.path = path
        self.config = dict(config)
        self.incidental = incidental

    @property
    def plots(self) -> Path:
        """Folder for pictures."""
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints."""
        return self.path / "checkpoints"

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or None."""
        file = self.checkpoints / "last.ckpt"
        return file if file.is_file() else None

    def result(self) -> dict[str, Any] | None:
        """Metrics of a finished run of this very config, or None where it is unfinished or has nothing to lose.

        Raises:
            InputError: The folder holds a run of another config; says which keys differ.
        """
        config_file, metrics_file = self.path / "config.yaml", self.path / "metrics.json"
        if not config_file.is_file() or not (metrics_file.is_file() or self.last_checkpoint()):
            return None
        found = _mapping(config_file, yaml.safe_load)
        keys = [key for key in {**found, **self.config} if key not in self.incidental]
        differ = [key for key in keys if found.get(key) != self.config.get(key)]
        if differ:
            changes = ", ".join(f"{key}={found.get(key)} (now {self.config.get(key)})" for key in differ[:4])
            raise InputError(
                f"{self.path} holds another run, with {changes}: choose another --name or pass --overwrite"
            )
        if not metrics_file.is_file():
            return None
        return _mapping(metrics_file, json.loads)

    def clear(self) -> None:
        """Delete what a run writes; other files in the folder stay."""
        for name in (*_CONTENTS, *_STATE_FILES):
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def start(self) -> None:
        """Create the folder and write ``config.yaml``."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._write("config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; from now on the run counts as finished."""
        self._write("metrics.json", json.dumps(metrics, indent=2) + "\n")

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path / name)

    @contextmanager
    def logging(self, terminal: bool = True) -> Iterator[None]:
        """Send our log records to the terminal, if `terminal`; these, Lightning's and warnings to ``log.txt``."""
        file = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers: list[logging.Handler] = [file]
        if terminal:
            screen = logging.StreamHandler(sys.stdout)
            screen.addFilter(lambda record: not record.name.startswith("lightning"))
            screen.setFormatter(_Terminal())
            handlers.append(screen)
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
        for logger in loggers:
            logger.handlers = list(handlers)
            logger.setLevel(logging.INFO)
            logger.propagate = False
        logging.captureWarnings(True)
        try:
            with warnings.catch_warnings():
                # images come from memory: more loader processes would slow it down
                warnings.filterwarnings("ignore", message=".*does not have many workers.*")
                warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # resuming
                warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.")
                yield
        finally:
            logging.captureWarnings(False)
            for logger, own, level, propagate in before:
                logger.handlers = own
                logger.setLevel(level)
                logger.propagate = propagate
            file.close()


def _mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{file} is damaged ({' '.join(str(error).split())}): pass --overwrite to run again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged (no mapping in it): pass --overwrite to run again")
    return content


class _Terminal(logging.Formatter):
    """The message alone, with its level where that is worth a look."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"
