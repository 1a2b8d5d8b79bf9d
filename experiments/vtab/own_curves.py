"""Losses epoch by epoch, to see who converges faster: at equal learning rates (tuning runs), and at the tuned ones."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from eva_lightning.errors import InputError
from eva_lightning.methods.registry import METHODS, MethodKey
from eva_lightning.reading import reading
from experiments.runner.statistics import Interval, Range, paired_values
from experiments.vtab.own_results import MARK, MEAN, OwnResults, full_label
from experiments.vtab.table_layout import Sheet, SheetLine

#: Column of metrics.csv -> what it is called.
LOSSES = {"train_loss": "training loss", "val_loss": "held-out loss"}
_KEYS = ("place", "experiment", "method", "task", "phase", "seed", "lr")

_RELATIVE = (
    "Cells: the method's {loss} against {baseline}'s, in percent (negative: lower): the geometric mean of ratios, run "
    "by run over equal seeds and folders, in square brackets its 95% interval over seeds (Student's t of logarithms) "
    "where there are two or more, and in how many folders it is lower. Lines of {baseline}: its own loss in nats. "
)
_TRAINING = "A training loss is the mean over the minibatches of its epoch, while the weights change. "
_EQUAL = "At each learning rate of the grid, the same for both methods: from the tuning runs (800 + 200 protocol). "
_TUNED = "Each method at the learning rate chosen for it: from the final runs. "


def read_histories(results: OwnResults) -> pd.DataFrame:
    """The epochs of all runs that keep them: columns as `results.runs`, ``epoch``, ``train_loss`` and ``val_loss``.

    Raises:
        InputError: A ``metrics.csv`` is damaged.
    """
    parts = []
    for _, run in results.runs.iterrows():
        file = Path(run["place"]) / "metrics.csv"
        history = read_history(file) if run["losses"] is None and file.is_file() else run["losses"]
        if history is not None:
            parts.append(history.assign(**{name: run[name] for name in _KEYS}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*_KEYS, "epoch", *LOSSES])


def read_history(file: Path) -> pd.DataFrame:
    """Columns ``epoch``, ``train_loss`` and ``val_loss`` of one run; NaN where nothing was validated.

    Raises:
        InputError: The file is damaged.
    """
    remedy = "delete the folder of this run and rerun the sweep"
    with reading(file, remedy):
        frame = pd.read_csv(file, usecols=["epoch", *LOSSES]).astype(float).astype({"epoch": int})
    if frame["epoch"].duplicated().any() or not (frame["train_loss"] > 0).all():
        raise InputError(f"{file} is damaged (epochs twice, or a loss that is no positive number): {remedy}")
    return frame


def curve_sheets(results: OwnResults, histories: pd.DataFrame) -> list[Sheet]:
    """Early epochs and the last one: at equal rates, at tuned rates, and of held-out losses where they were noted."""
    sheets = []
    for loss, name in LOSSES.items():
        known = histories[histories[loss].notna()]
        rates = {f"lr {rate:g}": found for rate, found in known[known["phase"] == "tune"].groupby("lr")}
        tuned = of_entries(results, known[known["phase"] == "final"])
        places = {f"{folder}{MARK}": tuned[tuned["task"] == folder] for folder in results.folders}
        places |= {MEAN: tuned} if len(places) > 1 else {}
        title = f"{name.capitalize()} by epoch at {{}} learning rates"
        sheets.append(_sheet(results, loss, title.format("equal"), _EQUAL, rates, "equal"))
        sheets.append(_sheet(results, loss, title.format("tuned"), _TUNED, places, "tuned"))
    return [sheet for sheet in sheets if sheet.lines]


def of_entries(results: OwnResults, finals: pd.DataFrame) -> pd.DataFrame:
    """The final runs that count: of several learning rates, ranks and ρ those that were chosen."""
    counted = {place for entry in results.entries for place in entry.runs["place"]}
    return finals[finals["place"].isin(counted)]


def _sheet(
    results: OwnResults, loss: str, title: str, caption: str, places: dict[str, pd.DataFrame], kind: str
) -> Sheet:
    everything = pd.concat(list(places.values())) if places else pd.DataFrame(columns=[*_KEYS, "epoch", *LOSSES])
    baseline, lines = results.baseline, []
    for epoch in shown_epochs(everything["epoch"]):
        for method in ordered(everything["method"], baseline):
            cells: dict[str, str] = {}
            for column, found in places.items():
                at = found[found["epoch"] == epoch]
                text = _own_loss(at, method, loss) if method == baseline else _against(at, method, baseline, loss)
                cells |= {column: text} if text else {}
            if cells:
                lines.append(SheetLine("ours", f"epoch {epoch}: {full_label(method)}", cells, f"epoch {epoch}"))
    text = caption + _RELATIVE.format(loss=LOSSES[loss], baseline=full_label(baseline))
    text += (_TRAINING if loss == "train_loss" else "") + results.setup
    return Sheet(f"own-{loss.removesuffix('_loss')}-{kind}", title, text, tuple(places), tuple(lines))


def shown_epochs(epochs: pd.Series[int]) -> list[int]:
    """1, 2, 3 and the last."""
    if epochs.empty:
        return []
    last = int(epochs.max())
    return sorted({epoch for epoch in (1, 2, 3) if epoch < last} | {last})


def ordered(methods: pd.Series[str], baseline: str) -> list[str]:
    """Keys of methods, the baseline first, then as in reports."""
    order = list(METHODS)
    keys = [MethodKey.parse(key) for key in dict.fromkeys(methods)]
    return [key.key for key in sorted(keys, key=lambda k: (k.key != baseline, order.index(k.method), k.rho or 0.0))]


def _own_loss(at: pd.DataFrame, method: str, loss: str) -> str:
    """The mean over folders of the mean over seeds, its interval over seeds where all folders have several."""
    found = at[at["method"] == method]
    if found.empty:
        return ""
    by_seed = found.pivot_table(index="seed", columns="task", values=loss).dropna().mean(axis=1)
    return Interval.of(list(by_seed)).text(3) if len(by_seed) else f"{found[loss].mean():.3f}"


def _against(at: pd.DataFrame, method: str, baseline: str, loss: str) -> str:
    both = at[at["method"].isin([method, baseline])]
    folders = [task for task, found in both.groupby("task") if found["method"].nunique() == 2]
    if not folders:
        return ""
    shared = both[both["task"].isin(folders)]
    lower = sum(_lower(shared[shared["task"] == folder], method, baseline, loss) for folder in folders)
    values = [
        value
        for _, runs in shared.groupby("experiment")
        for value in paired_values(runs, method, baseline, loss, relative=True)
    ]
    return f"{_percent(values)} ({lower}/{len(folders)})"


def _percent(log_ratios: list[float]) -> str:
    """The geometric mean of ratios minus 1, from 100 times their logarithms; its interval where there are several."""
    if not log_ratios:
        return "–"
    logs = Interval.of(log_ratios)
    if not math.isfinite(logs.mean):
        return logs.text()
    mean, low, high = (100 * math.expm1(value / 100) for value in (logs.mean, logs.low, logs.high))
    text = f"{mean:+.1f}" if logs.half is None else Range(mean, low, high, logs.n).text(1, sign=True)
    return text.replace("-", "−") + "%"


def _lower(of_folder: pd.DataFrame, method: str, baseline: str, loss: str) -> bool:
    means = of_folder.groupby("method")[loss].mean()
    return bool(means[method] < means[baseline])
