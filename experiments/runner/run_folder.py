"""A run is a folder: what it was asked to do, how far it got, what came out. Nothing else knows more about it.

- ``config.yaml``: its settings, written when it starts. The first line has the identity of the run.
- ``metrics.json``: written when it ends; a folder that has it is a finished run.
- ``error.txt``: the traceback of a run that failed. With neither, a run is pending: never begun, or interrupted.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from eva_lightning import ours
from eva_lightning.errors import DamagedFileError, InputError
from eva_lightning.files import digest, is_disk_full, with_numbers, writable_folder, write_text
from eva_lightning.names import check_length, check_name, shown
from eva_lightning.sealed import previous, read_sealed_json, set_aside, whole_checkpoint, write_sealed_json
from experiments.runner.ending import asked_to_end, is_asked_to_end
from experiments.runner.run_log import logging_to
from experiments.runner.settings import Role, flag, has_identity, identity, plain, role_of
from experiments.runner.worker import free_memory
from experiments.runner.yaml_files import read_yaml

#: What runs write: patterns of paths in the folder.
_CONTENTS = (
    "config.yaml", "metrics.json", "error.txt", "metrics.csv", "gradient_norms.csv", "log.txt",
    "weights.ckpt", "weights.safetensors", "backbone.safetensors", "eva_state.safetensors", "eva_state.json",
    "checkpoints/last*", "report.html", "merged/model.safetensors", "merged/config.json", "merged/README.md",
    "adapter/adapter_*", "adapter/README.md", "adapter/fused/adapter_*", "adapter/fused/README.md",
    *(f"plots/{name}.png" for name in ("accuracy", "loss", "ranks", "spectra", "convergence")),
    "csv/version_*/metrics.csv", "csv/version_*/hparams.yaml",
    "tensorboard/hparams.yaml", "tensorboard/events.out.tfevents.*", "tensorboard/*/events.out.tfevents.*",
    "wandb/run_id.txt", "wandb/latest-run", "wandb/debug*.log", "wandb/offline-run-*/**", "wandb/run-*/**",
)  # fmt: skip
_NAMES = tuple({path.partition("/")[0]: None for path in _CONTENTS})
_FIRST_LINE = "# run "
_ID = re.compile(re.escape(_FIRST_LINE) + r"[0-9a-f]{16}\s*")
#: Bytes of the longest path in a run's folder.
_ROOM = 128
_ANOTHER = f"choose another {flag('name')}"

_LOGGER = logging.getLogger(__name__)
_said_damaged: set[Path] = set()

Work = Callable[["RunFolder"], Mapping[str, Any]]


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; created by :meth:`start`.
        settings: Everything the run was asked to do: a dataclass whose options have roles.
    """

    def __init__(self, path: str | Path, settings: Any) -> None:
        self.path = Path(path)
        self.settings = settings

    @classmethod
    def below(cls, output: str | Path, name: str, settings: Any) -> RunFolder:
        """The folder called `name` in `output`.

        Raises:
            InputError: `name` is not the plain name of a folder.
        """
        return cls(Path(output) / check_name("the name of the run's folder", name), settings)

    @property
    def id(self) -> str:
        """16 digits: the same for the same settings, wherever and however they run."""
        return digest(identity(self.settings))

    @property
    def plots(self) -> Path:
        """Folder for figures."""
        return self.path / "plots"

    @property
    def checkpoints(self) -> Path:
        """Folder for checkpoints."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.path / "log.txt"

    def last_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, or None; a damaged one is set aside, and the one before it taken."""
        return whole_checkpoint(self._last)

    def result(self) -> dict[str, Any] | None:
        """Metrics of a finished run of these very settings, or None where it is unfinished or has nothing to lose.

        A damaged ``metrics.json`` is warned of, and is that of an unfinished run.

        Raises:
            InputError: The folder holds a run of other settings (says which differ), or ``config.yaml`` is damaged.
        """
        config, metrics = self.path / "config.yaml", self.path / "metrics.json"
        if not config.is_file() or not any(file.is_file() for file in (metrics, self._last, previous(self._last))):
            return None
        self._refuse_another_run(config)
        try:
            return with_numbers(read_sealed_json(metrics)) if metrics.is_file() else None
        except DamagedFileError as error:
            if metrics not in _said_damaged:
                _LOGGER.warning("%s: the run is not finished", error)
                _said_damaged.add(metrics)
            return None

    def error(self) -> str | None:
        """Traceback of a failed run, or None."""
        file = self.path / "error.txt"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def start(self) -> None:
        """Create the folder and write ``config.yaml``; metrics that are there are damaged, and set aside.

        Raises:
            InputError: Something of somebody else's is in the way.
        """
        self._claim()
        text = yaml.safe_dump(plain(self.settings), sort_keys=False, allow_unicode=True)
        write_text(self.path / "config.yaml", f"{_FIRST_LINE}{self.id}\n{text}")
        (self.path / "error.txt").unlink(missing_ok=True)
        if (self.path / "metrics.json").is_file():
            set_aside(self.path / "metrics.json", f"{self.path / 'metrics.json'} is damaged", "running again")

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write ``metrics.json``; from now on the run counts as finished."""
        write_sealed_json(self.path / "metrics.json", metrics)

    def fail(self, text: str) -> None:
        """Write ``error.txt``; from now on the run counts as failed."""
        self._claim()
        write_text(self.path / "error.txt", text)

    def clear(self) -> None:
        """Delete what a run writes; other files stay, also where they lie between.

        Raises:
            InputError: Something is there that this project has not written, or a link.
        """
        self.refuse_others()
        ours.delete(self.path, _CONTENTS)

    def clear_checkpoints(self) -> None:
        """Delete the run's checkpoints."""
        if not self.checkpoints.is_symlink():
            ours.delete(self.path, [path for path in _CONTENTS if path.startswith("checkpoints/")])

    def refuse_others(self) -> None:
        """Make sure that the folder can be this run's: nothing of somebody else's is where the run writes.

        Raises:
            InputError: Something is, or the folder is a link, or its path is too long.
        """
        check_length("the run's folder", self.path, room=_ROOM)
        if self.path.is_symlink():
            raise InputError(f"{self.path} is a symbolic link, and runs need folders of their own: {_ANOTHER}")
        config = self.path / "config.yaml"
        if config.exists() and not self._is_of_a_run(config):
            raise InputError(
                f"{self.path} holds a config.yaml that this program has not written: move it away, or {_ANOTHER}"
            )
        ours.refuse_others(self.path, _NAMES, _ANOTHER, known=_NAMES if config.exists() else ())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One process works in the folder at a time; others wait here."""
        writable_folder(self.path)
        self._claim()
        lock = FileLock(self.path / ".lock")
        with suppress(NotImplementedError):  # a file system that knows no locks
            try:
                lock.acquire(timeout=0)
            except Timeout:
                print(f"another process is at this run in {self.path}: waiting for it to end", flush=True)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def logging(self, terminal: bool = True) -> AbstractContextManager[None]:
        """Send log records to ``log.txt`` and, if `terminal`, ours to the terminal; exceptions that pass are logged."""
        self._claim()
        return logging_to(self.log, terminal)

    @property
    def _last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    def _claim(self) -> None:
        self.refuse_others()
        ours.claim(self.path, _NAMES, _ANOTHER, known=_NAMES if (self.path / "config.yaml").exists() else ())

    def _is_of_a_run(self, config: Path) -> bool:
        """Whether a run has written this file: by its first line, or by its settings where the line is lost."""
        try:
            text = config.read_text(encoding="utf-8")
            if _ID.fullmatch(text.partition("\n")[0]):
                return True
            found = read_yaml(config)
        except (ValueError, OSError):
            return False
        return isinstance(found, dict) and set(identity(self.settings)) <= set(found)

    def _refuse_another_run(self, config: Path) -> None:
        with config.open(encoding="utf-8", errors="replace") as file:
            first = file.readline().strip()
        if first == f"{_FIRST_LINE}{self.id}":
            return
        found = _mapping(config, read_yaml)
        names = [item.name for item in fields(self.settings) if Role.RESULT in role_of(item)]
        now = {name: plain(getattr(self.settings, name)) for name in names}
        differ = [name for name in now if found.get(name) != now[name]]
        if not differ and first.startswith(_FIRST_LINE):
            # the same path, but what lies there is another file
            differ = [name for name in now if has_identity(self.settings, name)]
        if differ:
            changes = ", ".join(f"{name}={_in_short(found.get(name))} (now {now[name]})" for name in differ[:4])
            raise InputError(
                f"{self.path} holds another run, with {changes}: choose another {flag('name')} or pass "
                f"{flag('overwrite')}"
            )


def is_follower() -> bool:
    """Whether this process was started by a run on several devices, to help with it: it trains and writes nothing.

    Lightning starts the whole command again for each device but the first.
    """
    return os.environ.get("LOCAL_RANK", "0") != "0"


def metrics_below(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Folder and metrics of every finished run below `folder`, at any depth, in order of their paths.

    Raises:
        InputError: A ``metrics.json`` is damaged.
    """
    for file in sorted(Path(folder).rglob("metrics.json")):
        try:
            yield file.parent, with_numbers(read_sealed_json(file))
        except DamagedFileError as error:
            raise InputError(f"{error}: {_again(file)}") from error


def runs_below(folder: str | Path) -> Iterator[Path]:
    """The folders of runs at or below `folder`, at any depth, whatever became of them, in order of their paths."""
    for config in sorted(Path(folder).rglob("config.yaml")):
        if config.is_file():
            with config.open(encoding="utf-8", errors="replace") as file:
                is_of_a_run = _ID.fullmatch(file.readline())
            if is_of_a_run:
                yield config.parent


def clear_runs(folder: str | Path) -> None:
    """Delete all runs below `folder`, at any depth, and nothing else.

    Raises:
        InputError: Something that a run has not written is where a run writes.
    """
    for place in runs_below(folder):
        run = RunFolder(place, None)
        run.clear()
        ours.delete(run.path, (ours.MARK, ".lock"))
        if next(run.path.iterdir(), None) is None:
            run.path.rmdir()


def perform(
    folder: RunFolder, build: Callable[[], Work], *, terminal: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Do a run, or hand out the metrics of a finished one: the one way a run happens.

    Args:
        folder: Where.
        build: Checks everything and builds what the run needs; nothing is written or deleted before it returns the work
            to do, a function of the folder that returns metrics.
        terminal: Show log records on the terminal as well.
        overwrite: Delete what an earlier run has left.

    Returns:
        The metrics, which ``metrics.json`` holds from then on; of a process that only helps what the work gives it.

    Raises:
        InputError: `build` refuses, or the folder holds a run of other settings.
    """
    metrics = _perform(folder, build, terminal, overwrite)
    # here, where nothing of the run has a name any more: its files are closed too
    free_memory()
    return metrics


def _perform(folder: RunFolder, build: Callable[[], Work], terminal: bool, overwrite: bool) -> dict[str, Any]:
    folder.refuse_others()
    found = None if overwrite else folder.result()
    if found is not None:
        return found
    work = _built(folder, build)
    if is_follower():
        with _interruptible():
            return dict(work(folder))
    with folder.lock():
        # another process may have done it meanwhile
        found = None if overwrite else folder.result()
        if found is not None:
            return found
        if overwrite:
            folder.clear()
        folder.start()
        with folder.logging(terminal), _interruptible(), _failure_noted(folder), _overflow_said():
            metrics = dict(work(folder))
            folder.finish(metrics)
    return metrics


def perform_or_report(
    folder: RunFolder, build: Callable[[], Work], headline: Callable[[Mapping[str, Any]], str], overwrite: bool
) -> dict[str, Any]:
    """:func:`perform` for a command: a finished run is reported, not repeated; an interrupted one is resumed."""
    folder.refuse_others()
    found = None if overwrite else folder.result()
    if found is not None and is_follower():
        return found
    if found is not None:
        print(f"{folder.path} is finished already (--overwrite runs it again): {headline(found)}")
        if found.get("diverged"):
            print(f"warning: {folder.path}: {found['diverged']}", flush=True)
    else:
        found = perform(folder, build, overwrite=overwrite)
    return found


@contextmanager
def _overflow_said() -> Iterator[None]:
    """Optimizers compute with their settings in the numbers of the weights, which end at 3e38."""
    try:
        yield
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        raise InputError(
            f"training has diverged: the optimizer cannot compute with its settings ({error}): lower {flag('lr')} or "
            f"{flag('weight_decay')}"
        ) from error


@contextmanager
def _failure_noted(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # neither is a fault of the run
        if not (is_disk_full(error) or is_asked_to_end()):
            folder.fail(traceback.format_exc())
        raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """When it is asked to end, Lightning ends with SystemExit: make that what it is elsewhere."""
    try:
        with asked_to_end():
            yield
    except SystemExit as error:
        raise KeyboardInterrupt from error


def _built(folder: RunFolder, build: Callable[[], Work]) -> Work:
    try:
        return build()
    except InputError:
        raise
    except Exception:
        with folder.logging(terminal=False):
            raise


def _mapping(file: Path, read: Callable[[Path, str], Any]) -> dict[str, Any]:
    content = read(file, _again(file))
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged (no mapping in it): {_again(file)}")
    return content


def _again(file: Path) -> str:
    return f"pass {flag('overwrite')} or delete {file.parent} to run again"


def _in_short(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() and len(value) < 80 else shown(value)
