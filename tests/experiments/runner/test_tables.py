from __future__ import annotations

import io

import pandas as pd
from rich.console import Console

from experiments.runner.statistics import PLUS_MINUS, Interval, Range
from experiments.runner.tables import as_markdown, cell, latex, show

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
    assert latex("a_b ± √ 語 100% & more") == r"a\_b $\pm$ $\sqrt{}$ ? 100\% \& more"


def test_terminal() -> None:
    console = Console(file=io.StringIO(), width=120)
    show(FRAME, "Losses", notes=[PLUS_MINUS], console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in ("Losses", "EVA (ρ = 1)", "0.12 ± 0.05", "–", "95% interval"):
        assert word in text
