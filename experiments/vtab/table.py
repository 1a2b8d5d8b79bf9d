"""Results beside the paper's Tables 18, 20, 21 and 25: ``python -m experiments.vtab table``.

Folders that are not the official draws of VTAB-1K's tasks have tables of their own, without the paper's numbers:
``own*.tex``, ``own.csv`` and ``own_*.png``.

Reads the finished runs of a sweep's folder, also while the sweep is running, or of any other folders. Prints the tables
and writes ``table.md``, ``table.csv`` (unrounded, one value a line), ``runs.csv`` (one run a line, which can be read in
place of the folders), ``table.tex`` with one file per table, and one figure per group of tasks. The paper's numbers are
in ``paper_tables.csv``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from eva_lightning import plots
from eva_lightning.errors import InputError
from eva_lightning.files import only_process, writable_folder, write_text
from eva_lightning.methods.registry import method_names
from eva_lightning.ours import claim, delete
from experiments.runner.command import SettingsCommand
from experiments.runner.settings import Role, check_settings, option
from experiments.vtab.grid import SELECTED_BY
from experiments.vtab.own_curves import curve_sheets, read_histories
from experiments.vtab.own_figures import own_figures
from experiments.vtab.own_results import OwnResults, own_folders, own_results, parse_groups
from experiments.vtab.run_list import as_list
from experiments.vtab.table18 import is_asked_for, table18_sheet
from experiments.vtab.table_layout import LAYOUTS, Difference, Notes, Sheet, differences, differences_sheet
from experiments.vtab.table_own import own_csv, own_sheets
from experiments.vtab.table_plots import group_figures
from experiments.vtab.table_results import Ours, gather, read_runs
from experiments.vtab.table_rho import rho_figures
from experiments.vtab.table_write import WIDTH, as_csv, as_latex, as_markdown, print_sheets

_FORMER = (
    *("table.md", "table.csv", "runs.csv", "table.tex", "own.tex"),
    *(f"table{number}.tex" for number in (18, 20, 21, 25)),
    *("differences.tex", "natural.png", "specialized.png", "structured.png", "average.png", "rho.png"),
    *(f"own-{name}.tex" for name in ("differences", "ranks", "rates", "seconds", "folders")),
    *(f"own-{loss}-{rates}.tex" for loss in ("train", "val") for rates in ("equal", "tuned")),
    *("own.csv", "own_differences.png", "own_curves.png"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which results, and how to show them."""

    runs: tuple[str, ...] = option(
        ("runs/vtab",), "folders of finished runs: OUTPUT of the sweep command, or of the run command; or the runs.csv "
        "that this command has written of them", Role.SELECTION,
    )  # fmt: skip
    output: str = option(
        "runs/vtab/table", "folder for table.md, table.csv, runs.csv, table.tex and figures", Role.PLACE
    )
    layout: str = option(
        "all", "18 (EVA-raw, EVA-max), 20 (accuracy and differences), 21 (deviations), 25 (ablations), own (folders "
        "that are not VTAB-1K's official draws) or all",
        Role.SELECTION, choices=("18", "20", "21", "25", "own", "all"),
    )  # fmt: skip
    rows: str = option(
        "best", "best (EVA with the better ρ of each task), or rho (a row for every ρ besides)", Role.SELECTION,
        choices=("best", "rho"),
    )  # fmt: skip
    baseline: str = option(
        "lora", "method that the others are compared with", Role.SELECTION, choices=method_names("vision")
    )
    select: str = option(
        "accuracy", "what tuning was judged by: that of the sweep's --select", Role.SELECTION, choices=SELECTED_BY
    )
    model: str | None = option(None, "take results of this model only", Role.SELECTION)
    groups: tuple[str, ...] = option(
        (), "groups of other folders, for means over them: my_textures=natural,my_maps=specialized", Role.SELECTION
    )
    about: str = option("", "a sentence for the captions of other folders: what weights and data are", Role.SELECTION)

    def __post_init__(self) -> None:
        check_settings(self)
        parse_groups(self.groups)


@dataclass(frozen=True)
class Tables:
    """What the command shows: our results, the sheets, the differences, and the sentences of the notes.

    Attributes:
        own: Results on folders that are not VTAB-1K's official draws, and `histories` their epochs.
        beside: There are others, which stand beside the paper's.
    """

    ours: tuple[Ours, ...]
    sheets: tuple[Sheet, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    own: OwnResults | None
    histories: pd.DataFrame
    beside: bool


def run(settings: Settings) -> Tables:
    """Read, print and write.

    Raises:
        MissingInputError: There are no results yet; says what to run.
        InputError: A file is damaged, or two runs are of the same settings.
    """
    runs = read_runs(settings.runs, settings.select)
    if settings.model is not None:
        models = ", ".join(runs["model"].unique())
        runs = runs[runs["model"] == settings.model]
        if runs.empty:
            raise InputError(f"there are no results of model {settings.model!r}, but of {models}", setting="model")
    folder = Path(settings.output)
    claim(folder, _FORMER, "choose another --output")
    tables = make_tables(
        runs, settings.layout, settings.baseline, settings.rows == "rho", settings.groups, settings.about
    )
    console = Console(highlight=False)
    if console.width < WIDTH and not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    print_sheets(console, tables.sheets, tables.notes)
    with only_process(writable_folder(folder) / ".lock", f"another process is writing tables to {folder}"):
        files = _write(tables, folder, rho_figures(runs), as_list(runs, tables.histories))
    shown = tables.ours if tables.own is None or tables.beside else tables.own.entries
    count = sum(sample.n for entry in shown for sample in entry.samples.values())
    print(f"{count} runs, {len(shown)} methods -> {settings.output}: {', '.join(files)}")
    return tables


def make_tables(
    runs: pd.DataFrame,
    layout: str = "all",
    baseline: str = "lora",
    each_rho: bool = False,
    groups: Sequence[str] = (),
    about: str = "",
) -> Tables:
    """All that the command shows of `runs`, which :func:`~experiments.vtab.table_results.read_runs` gives."""
    ours, notes = gather(runs, each_rho), Notes()
    found = differences(ours, baseline)
    own = own_results(runs, baseline, groups, each_rho, about) if layout in ("own", "all") else None
    histories = pd.DataFrame() if own is None else read_histories(own)
    # a table of the paper's without a line of ours is none of the results
    beside = layout != "own" and (layout != "all" or not set(runs["task"]) <= set(own_folders(runs)))
    sheets = [] if own is None else [*own_sheets(own, notes), *curve_sheets(own, histories)]
    sheets += [each.sheet(ours, notes) for each in LAYOUTS if beside and layout in (str(each.number), "all")]
    if layout == "18" or (layout == "all" and beside and is_asked_for(ours)):
        sheets.append(table18_sheet(ours, notes))
    if layout == "20" or (layout == "all" and beside):
        sheets.append(differences_sheet(found, notes))
    if not sheets:
        raise InputError("all results are of VTAB-1K's tasks, none of other folders", setting="layout")
    return Tables(tuple(ours), tuple(sheets), tuple(found), tuple(notes.sentences), own, histories, beside)


def _write(tables: Tables, folder: Path, more: Mapping[str, Figure], each_run: str) -> list[str]:
    """Write all files into `folder`, in place of those of before; returns their names."""
    figures = {
        **(own_figures(tables.own, tables.histories) if tables.own is not None else {}),
        **(group_figures(tables.ours, Notes(tables.notes)) if tables.beside else {}),
        **more,
    }
    texts = {
        "table.md": as_markdown(tables.sheets, tables.notes, list(figures)),
        "table.csv": as_csv(tables.ours, tables.differences),
        "runs.csv": each_run,
        **({"own.csv": own_csv(tables.own)} if tables.own is not None else {}),
        **as_latex(tables.sheets, tables.notes),
    }
    claim(folder, (*texts, *figures), "choose another --output")
    delete(folder, set(_FORMER) - {*texts, *figures})
    for name, text in texts.items():
        write_text(folder / name, text)
    for name, figure in figures.items():
        plots.save(figure, folder / name, dpi=100 if name.startswith("own_") else 130)
    return [*texts, *figures]


COMMAND = SettingsCommand(
    Settings,
    "python -m experiments.vtab table",
    "Results beside the paper's Tables 20, 21 and 25, as Markdown, CSV, LaTeX and figures.",
    "experiments.vtab.table:run",
)
parse, main, command_line = COMMAND.parse, COMMAND.main, COMMAND.command_line
