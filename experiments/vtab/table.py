"""Results beside the paper's Tables 20, 21 and 25: ``python -m experiments.vtab table``.

Reads the final runs of a sweep's results store, also while the sweep is running, and with ``--runs`` those of run
folders. Prints the tables and writes ``table.md``, ``table.csv`` (unrounded, one value a line), ``table.tex`` with one
file per table, and one picture per group of tasks. The paper's numbers are in ``paper_tables.csv``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eva_lightning.errors import InputError, MissingInputError, unknown
from eva_lightning.methods.keys import METHOD_TRAITS
from experiments.runner.cli import in_terminal
from experiments.runner.settings import option, parse_settings
from experiments.vtab.table_layout import (
    Difference,
    Notes,
    Sheet,
    differences,
    differences_sheet,
    table20,
    table21,
    table25,
)
from experiments.vtab.table_results import Ours, RunResult, gather, read_folders, read_store
from experiments.vtab.table_write import WIDTH, as_csv, as_latex, as_markdown, print_sheets

#: Which tables a layout has; differences come with Table 20.
LAYOUTS = ("20", "21", "25", "all")

_FORMER = ("table.md", "table.csv", "table.tex", "table20.tex", "table21.tex", "table25.tex", "differences.tex",
           "natural.png", "specialized.png", "structured.png", "average.png")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Which results, and how to show them."""

    store: str = option("runs/vtab/results.sqlite", "results store of the sweep command")
    runs: str | None = option(None, "also take the run folders below this one")
    output: str = option("runs/vtab/table", "folder for table.md, table.csv, table.tex and pictures")
    layout: str = option("all", "20 (accuracy and differences), 21 (deviations), 25 (ablations by group) or all")
    baseline: str = option("lora", "method that the others are compared with")
    model: str | None = option(None, "take results of this model only")

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(unknown("layout", self.layout, LAYOUTS))
        if self.baseline not in METHOD_TRAITS:
            raise InputError(unknown("method", self.baseline, METHOD_TRAITS))


@dataclass(frozen=True)
class Tables:
    """What the command shows: our results, the sheets, the differences, and the sentences of the notes."""

    ours: tuple[Ours, ...]
    sheets: tuple[Sheet, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def parse(args: Sequence[str] | None = None) -> Settings:
    """Settings from a command line (``sys.argv`` for None), defaults, and YAML files given by ``--config``."""
    description = "Results beside the paper's Tables 20, 21 and 25, as Markdown, CSV, LaTeX and pictures."
    return parse_settings(Settings, "python -m experiments.vtab table", description, args)


def main(args: Sequence[str] | None = None) -> Tables:
    """Read, print and write as the command line `args` says (``sys.argv`` for None).

    Raises:
        MissingInputError: There are no results yet; says what to run.
        InputError: A setting is wrong, a file is damaged, or two runs are of the same settings.
    """
    settings = parse(args)
    tables = make_tables(read(settings), settings.layout, settings.baseline)
    folder = Path(settings.output)
    _show(tables)
    files = _write(tables, folder)
    runs = sum(sample.n for entry in tables.ours for sample in entry.samples.values())
    print(f"{runs} runs, {len(tables.ours)} methods -> {folder}: {', '.join(files)}")
    return tables


def read(settings: Settings) -> list[RunResult]:
    """The results that `settings` name: those of the store first.

    Raises:
        MissingInputError: There are none.
        InputError: A file is damaged.
    """
    results: list[RunResult] = []
    store = Path(settings.store)
    if settings.runs is not None:
        if store.is_file():
            try:
                results += read_store(store)
            except FileNotFoundError:  # nothing final in it yet: the folders may have something
                results = []
        results += read_folders(settings.runs)
    elif store.is_file():
        results += read_store(store)
    else:
        raise MissingInputError(
            f"there is no results store {store}: python -m experiments.vtab sweep --root DIR makes it; runs of the run "
            "command are read with --runs FOLDER"
        )
    if settings.model is None:
        return results
    models = list(dict.fromkeys(result.model for result in results))
    if settings.model not in models:
        raise InputError(f"there are no results of model {settings.model!r}, but of {', '.join(models)}")
    return [result for result in results if result.model == settings.model]


def make_tables(results: Sequence[RunResult], layout: str = "all", baseline: str = "lora") -> Tables:
    """All that the command shows of `results`."""
    ours = gather(results)
    notes = Notes()
    found = differences(ours, baseline)
    sheets: list[Sheet] = []
    if layout in ("20", "all"):
        sheets.append(table20(ours, notes))
    if layout in ("21", "all"):
        sheets.append(table21(ours, notes))
    if layout in ("25", "all"):
        sheets.append(table25(ours, notes))
    if layout in ("20", "all"):
        sheets.append(differences_sheet(found, notes))
    return Tables(tuple(ours), tuple(sheets), tuple(found), tuple(notes.sentences))


def _show(tables: Tables) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if console.width < WIDTH and not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    print_sheets(console, tables.sheets, tables.notes)


def _write(tables: Tables, folder: Path) -> list[str]:
    """Write all files into `folder`, in place of those of before; returns their names."""
    from experiments.vtab.table_plots import group_figures

    notes = Notes()
    notes.sentences.extend(tables.notes)
    figures = {f"{group}.png": figure for group, figure in group_figures(tables.ours, notes).items()}
    texts = {
        "table.md": as_markdown(tables.sheets, tables.notes, list(figures)),
        "table.csv": as_csv(tables.ours, tables.differences),
        **as_latex(tables.sheets, tables.notes),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FORMER:
        if name not in texts and name not in figures:
            (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        temporary = folder / f"{name}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    for name, figure in figures.items():
        temporary = folder / f"{name}.part"
        figure.savefig(temporary, dpi=130, format="png")
        temporary.replace(folder / name)
    return [*texts, *figures]


def command_line(args: Sequence[str] | None = None) -> int:
    """:func:`main` for a terminal: one sentence on standard error, and exit status 2, where the input is wrong."""
    return in_terminal(main, args)


if __name__ == "__main__":
    sys.exit(command_line())
