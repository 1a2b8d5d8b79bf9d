"""What demonstrations are worth, as a table: printed where they are collected and where they are imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from eva_lightning.rl.demonstrations import DemonstrationIndex
from experiments.metaworld.success import COLUMNS_NOTE, definitions
from experiments.runner.tables import show

#: Table 22 of the paper: mean return of the data of Schmied et al. for each task of MT40.
_PAPER = Path(__file__).with_name("paper_data.csv")
_RETURNS = ("mean return", "max return", "paper's mean")


def show_demonstrations(index: DemonstrationIndex, tasks: Sequence[str], *, beside_paper: bool = False) -> None:
    """Print a line per task, and the mean of the tasks where there are several.

    Args:
        index: The folder's index.
        tasks: Tasks to show.
        beside_paper: Add the paper's mean return and success (Table 22), of the tasks that it lists.
    """
    frame = statistics(index, tasks)
    notes = [COLUMNS_NOTE]
    if beside_paper:
        paper = pd.read_csv(_PAPER, comment="#", index_col="task").reindex(list(tasks))
        frame["paper's mean"], frame["paper's success"] = paper["mean_return"], paper["success"]
        notes.append("The paper's figures are those of its Table 22, which lists the tasks of MT40.")
    if len(tasks) > 1:
        means = frame.drop(columns=["episodes", "max return"]).astype(float).mean(skipna=False)
        frame = frame.astype(object)
        frame.loc["mean of all"] = means
    digits = {**dict.fromkeys(frame.columns, 3), **dict.fromkeys(_RETURNS, 0)}
    show(frame, "demonstrations", digits, notes=notes)


def statistics(index: DemonstrationIndex, tasks: Sequence[str]) -> pd.DataFrame:
    """Number of episodes, success by both definitions (NaN where it is not known) and returns of each task."""
    entries = [index[task] for task in tasks]
    shares = {each.title: [getattr(entry, each.rate) for entry in entries] for each in definitions()}
    return pd.DataFrame(
        {
            "episodes": [entry.episodes for entry in entries],
            **{title: pd.Series(values, dtype=float).to_list() for title, values in shares.items()},
            "mean return": [entry.mean_return for entry in entries],
            "max return": [entry.max_return for entry in entries],
        },
        index=pd.Index(tasks, name="task"),
    )
