from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from experiments.runner.statistics import PLUS_MINUS, Interval, Range
from experiments.runner.tables import as_csv, as_latex, as_markdown, cell, latex, show, write_table

FRAME = pd.DataFrame(
    {
        "loss ρ": {"EVA (ρ = 1)": Interval(0.1234, 0.0456, 5), "LoRA_2": Interval(0.5, None, 1)},
        "success, %": {"EVA (ρ = 1)": Range(52.0, 48.0, 57.0, 5), "LoRA_2": None},
        "runs": {"EVA (ρ = 1)": 5, "LoRA_2": 1},
    }
)


def test_cells() -> None:
    assert cell(Interval(0.1234, 0.0456, 5)) == "0.12 ± 0.05"
    assert cell(Interval(0.1234, None, 1), 3, sign=True) == "+0.123"
    assert cell(Range(0.52, 0.48, 0.57, 5)) == "0.52 [0.48, 0.57]"
    assert [cell(value) for value in (1.234, 3, "text", None, float("nan"), pd.NA)] == [
        "1.23", "3", "text", "–", "–", "–",
    ]  # fmt: skip


def test_markdown() -> None:
    lines = as_markdown(FRAME, {"loss ρ": 3, "success, %": 0}).splitlines()
    rows = [[word.strip() for word in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["", "loss ρ", "success, %", "runs"]
    assert rows[2] == ["EVA (ρ = 1)", "0.123 ± 0.046", "52 [48, 57]", "5"]
    assert rows[3] == ["LoRA_2", "0.500", "–", "1"]
    assert [set(word) for word in rows[1]] == [{":", "-"}] * 4


def test_latex() -> None:
    text = as_latex(FRAME, "Loss after 100% & more", "tab:loss")
    assert r"\caption{Loss after 100\% \& more}" in text
    assert r"\label{tab:loss}" in text
    assert r"\begin{tabular}{lrrr}" in text
    assert r"EVA ($\rho$ = 1) & 0.12 $\pm$ 0.05 & 52.00 [48.00, 57.00] & 5 \\" in text
    assert r"LoRA\_2 & 0.50 & -- & 1 \\" in text
    assert text.isascii()
    assert latex("a_b ± √ 語") == r"a\_b $\pm$ $\sqrt{}$ ?"


def test_csv_is_not_rounded() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(FRAME))))
    assert float(rows[0]["loss ρ"]) == 0.1234
    assert float(rows[0]["loss ρ low"]) == pytest.approx(0.0778)
    assert float(rows[0]["loss ρ high"]) == pytest.approx(0.169)
    assert (rows[0]["success, % low"], rows[1]["success, %"], rows[0]["runs"]) == ("48.0", "", "5")


def test_terminal() -> None:
    console = Console(file=io.StringIO(), width=120)
    show(FRAME, "Losses", notes=[PLUS_MINUS], console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("Losses", "EVA (ρ = 1)", "0.12 ± 0.05", "–", "95% interval"):
        assert word in text


def test_files_of_one_table(tmp_path: Path) -> None:
    files = write_table(FRAME, tmp_path / "losses", "Losses", notes=[PLUS_MINUS])
    assert [file.name for file in files] == ["losses.md", "losses.tex", "losses.csv"]
    assert PLUS_MINUS in files[0].read_text()
    assert "Student's t distribution" in files[1].read_text()
    assert r"\label{tab:losses}" in files[1].read_text()
