"""Sheets as Markdown, LaTeX (booktabs), CSV and text for the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from experiments.runner.statistics import Interval
from experiments.vtab.table_layout import NOTHING, Column, Difference, Sheet, SheetLine, letter, mean_interval
from experiments.vtab.table_paper import GROUP_HEADINGS, GROUPS, paper_lines
from experiments.vtab.table_results import Ours

if TYPE_CHECKING:
    from rich.console import Console

LEGEND = "Lines marked *paper* are printed in the paper (DINOv2-g/14); lines marked **ours** are measured here."

#: What the terminal needs at least.
WIDTH = 120

_CSV_COLUMNS = (
    "kind", "source", "method", "rho", "experiment", "column", "value", "std", "seeds", "low", "high", "tasks",
    "tasks_of_column", "comparable", "notes",
)  # fmt: skip


def as_markdown(sheets: Sequence[Sheet], notes: Sequence[str], pictures: Sequence[str]) -> str:
    """One document: legend, sheets, notes and pictures."""
    parts = ["# VTAB-1K: the paper's numbers beside ours", LEGEND]
    parts += _numbered(notes, "- **{}**: {}.")
    for sheet in sheets:
        head = ["", "method", *(column.heading for column in sheet.columns)]
        rows = [head, ["---", "---", *["---:"] * len(sheet.columns)]]
        for line in sheet.lines:
            mark = f" <sup>{line.marks}</sup>" if line.marks else ""
            words = [line.source, line.label]
            style = "**{}**" if line.source == "ours" else "*{}*"
            numbers = [_escape_markdown(line.cells[column.key]) for column in sheet.columns]
            if line.source == "ours":
                numbers = [f"**{number}**" if number != NOTHING else number for number in numbers]
            rows.append([style.format(words[0]), style.format(words[1]) + mark, *numbers])
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts += [f"## {sheet.title}", _escape_markdown(sheet.caption), table]
    parts += [f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def as_latex(sheets: Sequence[Sheet], notes: Sequence[str]) -> dict[str, str]:
    """Files by name: ``table20.tex`` and so on to be read by ``\\input``, and ``table.tex``, a document of all."""
    files = {f"{sheet.name}.tex": _latex_sheet(sheet, notes) for sheet in sheets}
    inputs = "\n".join(rf"\input{{{name.removesuffix('.tex')}}}" for name in files)
    document = (
        "\\documentclass[a4paper,landscape]{article}\n"
        "\\usepackage[utf8]{inputenc}\n"
        "\\usepackage[margin=1cm]{geometry}\n"
        "\\usepackage{booktabs,graphicx}\n"
        f"\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    return {"table.tex": document, **files}


def as_csv(ours: Sequence[Ours], differences: Sequence[Difference]) -> str:
    """Everything unrounded, one value a line.

    ``kind`` is accuracy or difference; ``column`` a task, group or average; for accuracies of tasks ``std`` and
    ``seeds`` tell the sample; ``low`` and ``high`` are the 95% interval; ``tasks`` of ``tasks_of_column`` are averaged.
    """
    file = io.StringIO()
    writer = csv.DictWriter(file, _CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for line in paper_lines():
        about: dict[str, Any] = {"kind": "accuracy", "source": "paper", "method": line.method, "comparable": True}
        writer.writerows({**about, **row} for row in _accuracies(line.samples))
        if not line.samples:
            for group, value in line.groups.items():
                size = len(GROUPS[group])
                writer.writerow({**about, "column": group, "value": value, "tasks": size, "tasks_of_column": size})
    for entry in ours:
        about = {
            "kind": "accuracy", "source": "ours", "method": entry.key.method, "rho": _plain(entry.key.rho),
            "experiment": entry.experiment, "comparable": not entry.notes, "notes": "; ".join(entry.notes),
        }  # fmt: skip
        writer.writerows({**about, **row} for row in _accuracies(entry.samples))
    for difference in differences:
        about = {
            "kind": "difference", "source": difference.source, "method": difference.label,
            "comparable": not difference.notes, "notes": "; ".join(difference.notes),
        }  # fmt: skip
        for column, tasks in [*((task, (task,)) for task in difference.tasks), *GROUPS.items()]:
            interval = difference.over(tasks)
            if interval is not None:
                shared = sum(task in difference.tasks for task in tasks)
                limits = _limits(interval)
                writer.writerow({**about, "column": column, "value": _plain(interval.mean), **limits,
                                 "tasks": shared, "tasks_of_column": len(tasks)})  # fmt: skip
    return file.getvalue()


def print_sheets(console: Console, sheets: Sequence[Sheet], notes: Sequence[str]) -> None:
    """The sheets as blocks of one group each, and one of means, that 120 columns hold."""
    from rich.table import Table
    from rich.text import Text

    for sheet in sheets:
        wide = sheet.has_tasks and sheet.name != "differences"
        for group in (*(GROUP_HEADINGS if wide else ()), None):
            if group == "average":
                continue
            columns = sheet.block(group)
            title = f"{sheet.title}: {GROUP_HEADINGS[group]}" if group else sheet.title
            table = Table(title=title + ("" if group or not sheet.has_tasks else ": means"), title_justify="left")
            table.add_column("", no_wrap=True, min_width=5)
            table.add_column("difference" if sheet.name == "differences" else "method")
            for column in columns:
                table.add_column(column.heading.replace("-", "-\n"), justify="right", no_wrap=True)
            before = None
            for line in sheet.lines:
                if line.is_extra and set(_cells(line, columns)) == {NOTHING}:
                    continue
                style = "bold" if line.source == "ours" else "italic"
                label = f"{line.label} [{line.marks}]" if line.marks else line.label
                if before not in (None, line.section):
                    table.add_section()
                before = line.section
                table.add_row(line.source, *map(Text, (label, *_cells(line, columns))), style=style)
            console.print(table)
        console.print(Text(sheet.caption, style="dim"))
        console.print()
    console.print(Text("paper (italic): printed in the paper, DINOv2-g/14; ours (bold): measured here"))
    for text in _numbered(notes, "[{}] {}"):
        console.print(Text(text))


def _cells(line: SheetLine, columns: Iterable[Column]) -> list[str]:
    return [line.cells[column.key] for column in columns]


def _numbered(notes: Sequence[str], style: str) -> list[str]:
    lines = [style.format(letter(index), note) for index, note in enumerate(notes)]
    if not lines:
        return []
    return ["Not comparable with the paper's numbers, or with reservations:", "\n".join(lines)]


def _accuracies(samples: Any) -> list[dict[str, Any]]:
    rows = []
    for column, tasks in [*((task, (task,)) for task in samples), *GROUPS.items()]:
        interval, known = mean_interval(samples, tasks)
        if interval is None:
            continue
        row = {"column": column, "value": _plain(interval.mean), **_limits(interval), "tasks": known,
               "tasks_of_column": len(tasks)}  # fmt: skip
        if column in samples:
            row |= {"std": _plain(samples[column].std), "seeds": samples[column].n}
        rows.append(row)
    return rows


def _limits(interval: Interval) -> dict[str, Any]:
    if interval.half is None:
        return {}
    return {"low": _plain(interval.mean - interval.half), "high": _plain(interval.mean + interval.half)}


def _plain(value: float | None) -> float | str:
    return "" if value is None else round(value, 6)


def _escape_markdown(text: str) -> str:
    return text.replace("*", "\\*")


def _latex_sheet(sheet: Sheet, notes: Sequence[str]) -> str:
    """A ``table`` environment; differences in blocks of one group each, which a page is wide enough for."""
    blocks: list[Sequence[Column]] = [sheet.columns]
    if sheet.name == "differences":
        blocks = [sheet.block(group) for group in ("natural", "specialized", "structured", None)]
    used = {mark for line in sheet.lines for mark in line.marks.split(",") if mark}
    remarks = [f"$^{{{letter(i)}}}$ {_latex(note)}." for i, note in enumerate(notes) if letter(i) in used]
    caption = " ".join([_latex(f"{sheet.title}. {sheet.caption}"), r"\textit{Italic}: the paper; \textbf{bold}: ours.",
                        *remarks])  # fmt: skip
    body = "\n\n\\medskip\n".join(_tabular(sheet, block) for block in blocks)
    return (
        f"% needs \\usepackage{{booktabs,graphicx}}\n\\begin{{table}}[p]\n\\centering\n"
        f"\\caption{{{caption}}}\n\\label{{tab:vtab-{sheet.name}}}\n{body}\n\\end{{table}}\n"
    )


def _tabular(sheet: Sheet, columns: Sequence[Column]) -> str:
    head = ["", "", *(_latex(column.heading) for column in columns)]
    rows = [*_latex_groups(columns), " & ".join(head) + r" \\", r"\midrule"]
    for line in sheet.lines:
        macro = "textbf" if line.source == "ours" else "textit"
        mark = f"$^{{{line.marks}}}$" if line.marks else ""
        words = (line.source, line.label, *_cells(line, columns))
        cells = [rf"\{macro}{{{_latex(word)}}}" for word in words]
        rows.append(" & ".join([cells[0], cells[1] + mark, *cells[2:]]) + r" \\")
    lines = "\n".join(rows)
    layout = "ll" + "r" * len(columns)
    return (
        f"\\resizebox{{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}}{{!}}{{%\n"
        f"\\begin{{tabular}}{{{layout}}}\n\\toprule\n{lines}\n\\bottomrule\n\\end{{tabular}}}}"
    )


def _latex_groups(columns: Sequence[Column]) -> list[str]:
    """The line of groups above the tasks, as in the paper's tables."""
    names = ["Mean" if column.is_mean else GROUP_HEADINGS[column.group] for column in columns]
    if set(names) == {"Mean"}:
        return []
    cells, rules, place = ["", ""], [], 3
    for name in dict.fromkeys(names):
        width = names.count(name)
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{name}}}")
        rules.append(rf"\cmidrule(lr){{{place}-{place + width - 1}}}")
        place += width
    return [" & ".join(cells) + r" \\", "".join(rules)]


#: What LaTeX needs instead; formulas first, as the longest match counts.
_LATEX = {
    "t(ν)√V": r"$t(\nu)\sqrt{V}$", "Σ(s²/n)/T²": r"$\Sigma(s^2/n)/T^2$", "\\": r"\textbackslash{}", "&": r"\&",
    "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "|": "$|$", "–": "--", "−": "$-$", "±": r"$\pm$", "²": "$^2$",
    "ρ": r"$\rho$", "ν": r"$\nu$",
}  # fmt: skip
_LATEX_PATTERN = re.compile("|".join(map(re.escape, _LATEX)) + r"|[^\x00-\x7f]")


def _latex(text: str) -> str:
    """`text` with LaTeX's special characters and our symbols replaced; a symbol unknown here is a question mark."""
    return _LATEX_PATTERN.sub(lambda match: _LATEX.get(match.group(), "?"), text)
