"""Tables of folders that are not VTAB-1K's official draws, apart from the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from experiments.vtab.own_pairs import Cell, Pairs, paired_cells, rank_columns
from experiments.vtab.own_results import MARK, OwnResults
from experiments.vtab.table_layout import Notes, Sheet, SheetLine, mean_interval
from experiments.vtab.table_results import Ours

_ACCURACY = (
    "Accuracy in percent on the test images, mean over seeds ± half a 95% interval (Student's t). Folders are fixed: "
    "an interval is one for these folders with new seeds."
)
_DIFFERENCES = (
    "Differences of accuracies in percent points, run by run over equal seeds (same images in the same order), ± half "
    "a 95% interval (Student's t), and in brackets the p-value of a paired t test, corrected by Holm's procedure: "
    "single folders are one family of {tests} tests, each column of means is one of its own, of the methods that have "
    "all its folders. *: corrected p below 0.05."
)
_RANKS = (
    "Rank of each method by its mean accuracy on a folder (1: best), averaged over folders, in brackets a 95% "
    "bootstrap interval over seeds, for these folders."
)
_RATES = (
    "The learning rate chosen in tuning, on the validation images; (lowest) or (highest): the edge of the rates tuned "
    "over, beyond which a better one may lie."
)
_SECONDS = (
    "Median seconds of a final run's training and evaluation, without the initialisation, on a machine that may have "
    "done other work at the same time."
)


def own_sheets(results: OwnResults, notes: Notes) -> list[Sheet]:
    """All sheets, the widest first."""
    pairs = paired_cells(results)
    sheets = [_accuracies(results, notes), _differences(results, pairs), _ranks(results), _rates(results)]
    sheets += [_seconds(results), _folders(results)]
    return [sheet for sheet in sheets if sheet.lines]


def _sheet(results: OwnResults, name: str, title: str, caption: str, columns: Any, lines: Any) -> Sheet:
    text = f"{caption} {results.setup}"
    return Sheet(name, f"{title} on folders that are not VTAB-1K's official draws", text, tuple(columns), tuple(lines))


def _accuracies(results: OwnResults, notes: Notes) -> Sheet:
    lines = []
    for entry in results.entries:
        cells = {}
        for column, folders in results.columns.items():
            interval, known = mean_interval(entry.samples, folders)
            if interval is not None:
                cells[column] = interval.text(1) + _share(known, folders)
        lines.append(SheetLine("ours", entry.label, cells, entry.key.method, notes.marks(entry.notes)))
        if entry.rhos:
            rhos = {f"{folder}{MARK}": f"{rho:g}" for folder, rho in entry.rhos.items()}
            lines.append(SheetLine("ours", f"{entry.label}: ρ chosen", rhos, entry.key.method, is_extra=True))
    return _sheet(results, "own", "Accuracy", _ACCURACY, results.columns, lines)


def _differences(results: OwnResults, pairs: Pairs) -> Sheet:
    lines = []
    for entry in results.entries:
        cells = {
            column: difference_in_words(pairs[entry.label, column])
            + _share(pairs[entry.label, column].folders, folders)
            for column, folders in results.columns.items()
            if (entry.label, column) in pairs
        }
        reference = results.reference(entry)
        if cells and reference is not None:
            lines.append(SheetLine("ours", f"{entry.label} − {reference.label}", cells, "differences"))
    single = sum(len(results.columns[column]) == 1 for (_, column), cell in pairs.items() if cell.p is not None)
    caption = _DIFFERENCES.format(tests=single)
    return _sheet(results, "own-differences", "Paired differences", caption, results.columns, lines)


def difference_in_words(cell: Cell) -> str:
    """``+0.6 ± 1.2 (0.31)``, with a star where the corrected p is below 0.05."""
    text = cell.interval.text(1, sign=True).replace("-", "−").replace("−0.0", "+0.0", 1)
    if cell.corrected is not None:
        text += f" ({'<0.001' if cell.corrected < 0.001 else f'{cell.corrected:.3f}'})"
    return text + "*" * cell.is_significant


def _ranks(results: OwnResults) -> Sheet:
    columns = rank_columns(results)
    lines = []
    for entry in results.entries:
        cells = {heading: of[entry.label].text(1) for heading, of in columns.items() if entry.label in of}
        if cells:
            lines.append(SheetLine("ours", entry.label, cells, "ranks"))
    return _sheet(results, "own-ranks", "Mean ranks", _RANKS, columns, lines)


def _rates(results: OwnResults) -> Sheet:
    def rate(found: pd.DataFrame) -> str:
        edge = found["edge"].iloc[0]
        return f"{found['lr'].iloc[0]:g}" + (f" ({edge})" if edge else "")

    return _sheet(results, "own-rates", "Learning rates", _RATES, _single(results), _by_folder(results, rate))


def _seconds(results: OwnResults) -> Sheet:
    def median(found: pd.DataFrame) -> str:
        return f"{found['seconds'].median():.0f}" if found["seconds"].notna().any() else ""

    lines = _by_folder(results, median)
    return _sheet(results, "own-seconds", "Seconds per run", _SECONDS, _single(results), lines)


def _by_folder(results: OwnResults, text: Any) -> list[SheetLine]:
    lines = []
    for entry in results.entries:
        cells = {f"{folder}{MARK}": text(found) for folder, found in entry.runs.groupby("task")}
        cells = {column: cell for column, cell in cells.items() if cell}
        if cells:
            lines.append(SheetLine("ours", entry.label, cells, "all"))
    return lines


def _single(results: OwnResults) -> list[str]:
    return [column for column, folders in results.columns.items() if len(folders) == 1]


def _folders(results: OwnResults) -> Sheet:
    lines = []
    for folder in results.folders:
        found = results.runs[(results.runs["task"] == folder) & (results.runs["phase"] == "final")]
        cells = {"group": results.groups.get(folder, "not said"), "official draw": "no"}
        for name, heading in _FOLDER_COLUMNS.items():
            values = sorted(found[name].dropna().unique())
            if values:
                cells[heading] = " or ".join(f"{value:g}" for value in values)
        lines.append(SheetLine("ours", f"{folder}{MARK}", cells, "folders"))
    columns = ("group", "official draw", *_FOLDER_COLUMNS.values())
    return _sheet(results, "own-folders", "Images used", "What final runs were trained and tested on.", columns, lines)


_FOLDER_COLUMNS = {
    "train_images": "training images", "test_images": "test images", "epochs": "epochs", "image_size": "px",
}  # fmt: skip


def _share(known: int, folders: Any) -> str:
    return "" if known == len(folders) else f" ({known}/{len(folders)})"


def own_csv(results: OwnResults) -> str:
    """Everything of these tables unrounded, one value a line.

    ``kind`` is accuracy (percent), difference (percent points; ``p`` and ``corrected_p`` with it), rank, lr (``edge``
    with it) or seconds; ``column`` a folder, or a mean of ``folders``; ``low`` and ``high`` are the 95% interval.
    """
    pairs = paired_cells(results)
    rows = [row for entry in results.entries for row in _rows(results, pairs, entry)]
    for heading, of in rank_columns(results).items():
        rows += [
            {"kind": "rank", "method": label, "column": heading, "value": r.mean, "low": r.low, "high": r.high}
            for label, r in of.items()
        ]
    columns = ["kind", "method", "column", "folders", "value", "low", "high", "seeds", "p", "corrected_p", "edge"]
    return pd.DataFrame(rows, columns=columns).round(6).to_csv(index=False, lineterminator="\n")


def _rows(results: OwnResults, pairs: Pairs, entry: Ours) -> Iterator[Mapping[str, Any]]:
    for column, folders in results.columns.items():
        about = {"method": entry.label, "column": column, "folders": ", ".join(folders)}
        interval, _ = mean_interval(entry.samples, folders)
        if interval is not None:
            yield {"kind": "accuracy", **about, "value": interval.mean, **_ends(interval)}
        cell = pairs.get((entry.label, column))
        if cell is not None:
            value = {"value": cell.interval.mean, "p": cell.p, "corrected_p": cell.corrected}
            yield {"kind": "difference", **about, **value, **_ends(cell.interval)}
        found = entry.runs[entry.runs["task"].isin(folders)]
        if len(folders) == 1 and len(found):
            yield {"kind": "lr", **about, "value": found["lr"].iloc[0], "edge": found["edge"].iloc[0]}
            yield {"kind": "seconds", **about, "value": found["seconds"].median(), "seeds": len(found)}


def _ends(interval: Any) -> dict[str, Any]:
    ends = {} if interval.half is None else {"low": interval.low, "high": interval.high}
    return {**ends, "seeds": interval.n}
