"""One run for a terminal: what can be said without torch is said first."""

from __future__ import annotations

from functools import partial
from typing import Any

from eva_lightning.vision.data.splits import open_task
from experiments.runner.loggers import check_loggers, parse_loggers
from experiments.runner.run_folder import RunFolder, Work, perform_or_report
from experiments.vtab.settings import Settings, headline


def run(settings: Settings) -> dict[str, Any]:
    """Do a run and return what ``metrics.json`` holds.

    A finished run of the same settings is reported, not repeated; an interrupted one is resumed.

    Raises:
        MissingInputError: Something of the data, or the weight file, is missing.
        InputError: The data is wrong, or the folder holds a run of other settings.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    folder = RunFolder.below(settings.output, settings.run_name, settings)
    return perform_or_report(folder, partial(_build, settings), headline, settings.overwrite)


def _build(settings: Settings) -> Work:
    check_loggers(parse_loggers(settings.logger))
    open_task(settings.root, settings.task, settings.split, settings.limit_train, settings.limit_test)
    # all that can be said of names and data has been said: now torch, Lightning and timm
    from experiments.vtab.run import build

    return build(settings)
