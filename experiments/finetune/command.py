"""One fine-tuning for a terminal: what can be said without torch is said first."""

from __future__ import annotations

from functools import partial
from typing import Any

from eva_lightning.errors import InputError
from experiments.finetune.outcome import headline, where
from experiments.finetune.settings import OneRun, Settings, images_digest
from experiments.runner.run_folder import RunFolder, Work, perform_or_report


def finetune(settings: Settings) -> dict[str, Any]:
    """Choose a learning rate if asked to, train, test, and write page, adapter and merged model.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        MissingInputError: Something of the data, or the weight file, is missing.
        InputError: The data is wrong, or the folder holds a run of other settings.
        UnreachableError: Pre-trained weights are wanted and the hub does not answer.
    """
    images = images_digest(settings.open())
    run = settings.one_run(settings.lr, images)
    tuning: list[dict[str, float]] = []
    if settings.tune:
        RunFolder.below(settings.output, settings.run_name, run).refuse_others()
        run, tuning = _tuned(settings, images)
    folder = RunFolder.below(settings.output, settings.run_name, run)
    metrics = perform_or_report(folder, partial(_build, run, tuning), headline, settings.overwrite)
    if not metrics.get("diverged"):
        print("\n".join(where(folder.path, metrics)), flush=True)
    return metrics


def _build(run: OneRun, tuning: list[dict[str, float]]) -> Work:
    # all that can be said of names and data has been said: now torch, Lightning and timm
    from experiments.finetune.run import build

    return build(run, tuning)


def _tuned(settings: Settings, images: str) -> tuple[OneRun, list[dict[str, float]]]:
    from experiments.finetune.search import RateSearch
    from experiments.runner.comparison import clear_output, run_comparison

    search = RateSearch(settings, images)
    if settings.overwrite:
        clear_output(search)
    results = run_comparison(search)
    choice = results.choices.get(search.cell)
    if choice is None:
        raise InputError(
            f"no learning rate of {', '.join(f'{lr:g}' for lr in settings.lrs)} could be trained: see error.txt in the "
            f"folders below {search.options.output}, or give others by --lrs"
        )
    rows = [
        {"lr": point.get("lr"), "loss": score[0], "accuracy": -score[1]} for point, score in choice.candidates.items()
    ]
    return settings.one_run(choice.point.get("lr"), images), sorted(rows, key=lambda row: row["lr"])
