"""Sheets as Markdown, LaTeX (booktabs), CSV and text for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.runner.statistics import Interval
from experiments.runner.tables import NOTHING, latex
from experiments.vtab.table_layout import (
    TASK_COLUMNS,
    Difference,
    Samples,
    Sheet,
    heading,
    letter,
    mean_interval,
    tasks_of,
)
from experiments.vtab.table_paper import GROUP_HEADINGS, GROUPS, paper_lines
from experiments.vtab.table_results import Ours

LEGEND = "Lines marked *paper* are printed in the paper (DINOv2-g/14); lines marked **ours** are measured here."

#: What the terminal needs at least.
WIDTH = 120

_CSV_COLUMNS = [
    "kind", "source", "method", "rho", "experiment", "column", "value", "std", "seeds", "low", "high", "tasks",
    "tasks_of_column", "comparable", "notes",
]  # fmt: skip


def as_markdown(sheets: Sequence[Sheet], notes: Sequence[str], figures: Sequence[str]) -> str:
    """One document: legend, sheets, notes and figures."""
    beside = any(not sheet.is_own for sheet in sheets)
    parts = [
        *(["# VTAB-1K: the paper's numbers beside ours", LEGEND] if beside else ["# Folders of images, measured here"]),
        *_numbered(notes, "- **{}**: {}."),
    ]
    for sheet in sheets:
        if sheet.is_own:
            parts += [f"## {sheet.title}", _escape_markdown(sheet.caption), _plain_table(sheet)]
            continue
        rows = []
        for line in sheet.lines:
            mark = f" <sup>{line.marks}</sup>" if line.marks else ""
            style = "**{}**" if line.source == "ours" else "*{}*"
            cells = [_escape_markdown(text) for text in line.texts(sheet.columns)]
            if line.source == "ours":
                cells = [f"**{text}**" if text != NOTHING else text for text in cells]
            rows.append([style.format(line.source), style.format(line.label) + mark, *cells])
        frame = pd.DataFrame(rows, columns=["", "method", *map(heading, sheet.columns)])
        align = ("left", "left", *["right"] * len(sheet.columns))
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        parts += [f"## {sheet.title}", _escape_markdown(sheet.caption), table]
    parts += [f"![{figure.removesuffix('.png')}]({figure})" for figure in figures]
    return "\n\n".join(parts) + "\n"


def _plain_table(sheet: Sheet) -> str:
    """A table with nobody's numbers but ours."""
    rows = [
        [line.label + (f" <sup>{line.marks}</sup>" if line.marks else ""), *line.texts(sheet.columns)]
        for line in sheet.lines
    ]
    frame = pd.DataFrame(rows, columns=["", *map(heading, sheet.columns)]).map(_escape_markdown)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=("left", *["right"] * len(sheet.columns)))


def _escape_markdown(text: str) -> str:
    return text.replace("*", "\\*")


def _numbered(notes: Sequence[str], style: str) -> list[str]:
    lines = [style.format(letter(index), note) for index, note in enumerate(notes)]
    return ["Not comparable with the paper's numbers, or with reservations:", "\n".join(lines)] if lines else []


def print_sheets(console: Console, sheets: Sequence[Sheet], notes: Sequence[str]) -> None:
    """The sheets as blocks of one group each, and one of means, that 120 columns hold."""
    for sheet in sheets:
        blocks = sheet.blocks()
        if sheet.name == "differences":
            blocks = {"means": blocks["means"]}
        for name, columns in blocks.items():
            title = sheet.title if len(blocks) == 1 else f"{sheet.title}: {GROUP_HEADINGS.get(name, name)}"
            console.print(_terminal_table(sheet, title, columns))
        console.print(Text(sheet.caption, style="dim"))
        console.print()
    if any(not sheet.is_own for sheet in sheets):
        console.print(Text("paper (italic): printed in the paper, DINOv2-g/14; ours (bold): measured here"))
    for text in _numbered(notes, "[{}] {}"):
        console.print(Text(text))


def _terminal_table(sheet: Sheet, title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    if not sheet.is_own:
        table.add_column("", no_wrap=True, min_width=5)
    table.add_column("difference" if sheet.name == "differences" else "method")
    for column in columns:
        table.add_column(heading(column).replace("-", "-\n"), justify="right", no_wrap=True)
    before = None
    for line in sheet.lines:
        texts = line.texts(columns)
        if line.is_extra and set(texts) == {NOTHING}:
            continue
        if before not in (None, line.section):
            table.add_section()
        before = line.section
        label = f"{line.label} [{line.marks}]" if line.marks else line.label
        style = "" if sheet.is_own else "bold" if line.source == "ours" else "italic"
        table.add_row(*([] if sheet.is_own else [line.source]), *map(Text, (label, *texts)), style=style)
    return table


def as_csv(ours: Sequence[Ours], differences: Sequence[Difference]) -> str:
    """Everything unrounded, one value a line.

    ``kind`` is accuracy or difference; ``column`` a task, group or average; for accuracies of tasks ``std`` and
    ``seeds`` tell the sample; ``low`` and ``high`` are the 95% interval; ``tasks`` of ``tasks_of_column`` are averaged.
    """
    rows = [*_paper_rows(), *_our_rows(ours), *_difference_rows(differences)]
    frame = pd.DataFrame(rows, columns=_CSV_COLUMNS).round(6)
    counts = ["seeds", "tasks", "tasks_of_column"]
    return frame.astype(dict.fromkeys(counts, "Int64")).to_csv(index=False, lineterminator="\n")


def _paper_rows() -> Iterator[dict[str, Any]]:
    for line in paper_lines().values():
        about = {"kind": "accuracy", "source": "paper", "method": line.method, "comparable": True}
        yield from ({**about, **row} for row in _accuracies(line.samples))
        if not line.samples:
            for group, value in line.averages[25].items():
                size = len(GROUPS[group])
                yield {**about, "column": group, "value": value, "tasks": size, "tasks_of_column": size}


def _our_rows(ours: Sequence[Ours]) -> Iterator[dict[str, Any]]:
    for entry in ours:
        about = {
            "kind": "accuracy", "source": "ours", "method": entry.key.method, "rho": entry.key.rho,
            "experiment": entry.experiment, **_comparable(entry.notes),
        }  # fmt: skip
        for row in _accuracies(entry.samples):
            yield {**about, **row, **({"rho": entry.rhos.get(row["column"])} if entry.rhos else {})}


def _difference_rows(differences: Sequence[Difference]) -> Iterator[dict[str, Any]]:
    for difference in differences:
        about = {"kind": "difference", "source": difference.source, "method": difference.label}
        for column in (*difference.tasks, *GROUPS):
            row = _interval_row(column, *difference.over(tasks_of(column)))
            if row:
                yield {**about, **_comparable(difference.notes), **row}


def _accuracies(samples: Samples) -> Iterator[dict[str, Any]]:
    for column in (*samples, *GROUPS):
        row = _interval_row(column, *mean_interval(samples, tasks_of(column)))
        if column in samples:
            row |= {"std": samples[column].std, "seeds": samples[column].n}
        if row:
            yield row


def _interval_row(column: str, interval: Interval | None, known: int) -> dict[str, Any]:
    if interval is None:
        return {}
    row = {"column": column, "value": interval.mean, "tasks": known, "tasks_of_column": len(tasks_of(column))}
    if interval.half is not None:
        row |= {"low": interval.mean - interval.half, "high": interval.mean + interval.half}
    return row


def _comparable(notes: Sequence[str]) -> dict[str, Any]:
    return {"comparable": not notes, "notes": "; ".join(notes)}


def as_latex(sheets: Sequence[Sheet], notes: Sequence[str]) -> dict[str, str]:
    """Files by name: ``table20.tex`` and so on to be read by ``\\input``, and ``table.tex``, a document of all."""
    files = {f"{sheet.name}.tex": _latex_table(sheet, notes) for sheet in sheets}
    inputs = "\n".join(rf"\input{{{name.removesuffix('.tex')}}}" for name in files)
    document = (
        "\\documentclass[a4paper,landscape]{article}\n"
        "\\usepackage[utf8]{inputenc}\n"
        "\\usepackage[margin=1cm]{geometry}\n"
        "\\usepackage{booktabs,graphicx}\n"
        f"\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    return {"table.tex": document, **files}


def _latex_table(sheet: Sheet, notes: Sequence[str]) -> str:
    """A ``table`` environment; differences in blocks of one group each, which a page is wide enough for."""
    blocks: Iterable[Sequence[str]] = sheet.blocks().values() if sheet.name == "differences" else [sheet.columns]
    used = {mark for line in sheet.lines for mark in line.marks.split(",") if mark}
    remarks = [f"$^{{{letter(i)}}}$ {latex(note)}." for i, note in enumerate(notes) if letter(i) in used]
    caption = " ".join([latex(f"{sheet.title}. {sheet.caption}"), r"\textit{Italic}: the paper; \textbf{bold}: ours.",
                        *remarks])  # fmt: skip
    body = "\n\n\\medskip\n".join(_tabular(sheet, columns) for columns in blocks)
    return (
        f"% needs \\usepackage{{booktabs,graphicx}}\n\\begin{{table}}[p]\n\\centering\n"
        f"\\caption{{{caption}}}\n\\label{{tab:vtab-{sheet.name}}}\n{body}\n\\end{{table}}\n"
    )


def _tabular(sheet: Sheet, columns: Sequence[str]) -> str:
    """A ``tabular`` no wider than the page, with a line of groups above the tasks as in the paper's tables."""
    rows = []
    for line in sheet.lines:
        macro = "textbf" if line.source == "ours" else "textit"
        cells = [rf"\{macro}{{{latex(word)}}}" for word in (line.source, line.label, *line.texts(columns))]
        cells[1] += f"$^{{{line.marks}}}$" if line.marks else ""
        rows.append(cells)
    heads = [("", ""), (" ", ""), *((_group(column, columns), latex(heading(column))) for column in columns)]
    frame = pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(heads))
    if not set(columns) & set(TASK_COLUMNS):
        frame.columns = frame.columns.droplevel(0)
    layout = "ll" + "r" * len(columns)
    tabular = frame.to_latex(index=False, escape=False, column_format=layout, multicolumn_format="c")
    return f"\\resizebox{{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}}{{!}}{{%\n{tabular.strip()}}}"


def _group(column: str, columns: Sequence[str]) -> str:
    """What stands above the heading of a column: its group; of all means together "Mean"."""
    if column in GROUPS and len(set(columns) & set(GROUPS)) > 1:
        return "Mean"
    return next((GROUP_HEADINGS[group] for group, tasks in GROUPS.items() if column in (group, *tasks)), "")
