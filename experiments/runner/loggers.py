"""Lightning's loggers by name: ``--logger wandb-offline,csv``.

What each writes lies in the run's folder: ``wandb/``, ``tensorboard/`` (``tensorboard --logdir runs`` finds all runs)
and ``csv/version_N/`` (one per start: a resumed run begins a new one). An offline wandb run is sent later by
``wandb sync RUN/wandb/offline-run-*``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva_lightning.errors import InputError, UnreachableError, check_choice
from eva_lightning.files import write_text

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LOGGERS = ("none", "csv", "tensorboard", "wandb", "wandb-offline")

#: For ``--help``.
LOGGER_HELP = f"{', '.join(LOGGERS[:-1])} or {LOGGERS[-1]}; several with commas between them"

PROJECT = "eva_lightning"


def parse_loggers(names: str | Sequence[str]) -> tuple[str, ...]:
    """Loggers from a list, or a text with commas; ``"none"`` gives none.

    Raises:
        InputError: An unknown name, no name, or names that exclude each other.
    """
    words = names.split(",") if isinstance(names, str) else names
    found = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not found:
        raise InputError(f"logger must be one or more of {', '.join(LOGGERS)}, got {names!r}", setting="logger")
    for name in found:
        check_choice("logger", name, LOGGERS)
    if "none" in found and len(found) > 1:
        raise InputError(f"logger none cannot be combined with others, got {names!r}", setting="logger")
    if {"wandb", "wandb-offline"} <= set(found):
        raise InputError(f"logger wandb cannot be combined with wandb-offline, got {names!r}", setting="logger")
    return () if found == ("none",) else found


def check_loggers(names: Sequence[str]) -> None:
    """Make sure that these loggers can work here, before anything is computed. Connects to nothing.

    Raises:
        InputError: A logger's package is not installed, or wandb would ask for an account.
    """
    if "tensorboard" in names and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise InputError("logger tensorboard needs a package that is not installed: pip install tensorboard")
    for name in names:
        if name.startswith("wandb") and not find_spec("wandb"):
            raise InputError(f"logger {name} needs a package that is not installed: pip install wandb")
    if "wandb" in names and not _has_wandb_account():
        raise InputError(
            "logger wandb has no API key: call `wandb login`, set WANDB_API_KEY, or take logger wandb-offline, which "
            "needs neither account nor network"
        )


@contextmanager
def open_loggers(
    names: Sequence[str],
    folder: str | Path,
    name: str,
    config: Mapping[str, Any],
    *,
    group: str | None = None,
    tags: Sequence[str] = (),
) -> Iterator[list[Logger]]:
    """Loggers that write below a run's folder, with its hyper-parameters; ended with the block, so that the next run of
    this process gets its own. An exception marks wandb's run as failed.

    Args:
        names: From :func:`parse_loggers`.
        folder: The run's folder.
        name: What the run is called in wandb.
        config: Hyper-parameters: everything the run was asked to do.
        group: wandb: what runs belong together, such as the seeds of one setting.
        tags: wandb: labels to search by.

    Raises:
        InputError: As :func:`check_loggers`.
        UnreachableError: wandb's server does not answer, or refuses.
    """
    check_loggers(names)
    Path(folder).mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = []
    failed = True
    try:
        for each in names:
            loggers.append(_make(each, Path(folder), name, group, tags))
            loggers[-1].log_hyperparams(dict(config))
        yield loggers
        failed = False
    finally:
        for logger in loggers:
            _close(logger, failed)


def _close(logger: Logger, failed: bool) -> None:
    """Write what is left and end the run of `logger`."""
    from lightning.pytorch.loggers import WandbLogger

    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=int(failed))
    else:
        logger.finalize("failed" if failed else "success")


def _make(kind: str, folder: Path, name: str, group: str | None, tags: Sequence[str]) -> Logger:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    if kind == "csv":
        return CSVLogger(folder, name="csv")
    if kind == "tensorboard":
        # no metric of -1 at the start: the one at the end is real (RunLogging)
        return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)
    return _make_wandb(folder, name, group, tags, offline=kind == "wandb-offline")


def _make_wandb(folder: Path, name: str, group: str | None, tags: Sequence[str], offline: bool) -> Logger:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    quiet = _quiet_settings()
    logger = WandbLogger(
        name,
        str(folder),
        id=_run_id(folder),
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=group,
        tags=list(tags),
        # not WandbLogger's offline=True, which would set WANDB_MODE for all that comes after in this process
        mode="offline" if offline else None,
        settings=quiet,
    )
    wandb.setup(quiet)
    try:
        _ = logger.experiment  # starts the run
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreachableError(
            f"wandb could not start a run ({reason}): logger wandb-offline needs neither account nor network"
        ) from error
    return logger


def _quiet_settings() -> Any:
    import wandb

    # log.txt has what the run says; wandb's own lines would tear progress bars
    return wandb.Settings(silent=True, console="off")


def _run_id(folder: Path) -> str:
    """The id of wandb's run, kept in the folder: a resumed run continues its curves, one begun anew gets new ones."""
    file = folder / "wandb" / "run_id.txt"
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text(encoding="utf-8").strip()


def _has_wandb_account() -> bool:
    """Whether wandb can log in without asking; also where WANDB_MODE makes that needless."""
    import wandb

    if os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled"):
        return True
    if "prompt" not in signature(wandb.login).parameters:  # before 0.28: starting the run will tell
        return True
    wandb.setup(_quiet_settings())
    return bool(wandb.login(prompt=False, verify=False))
