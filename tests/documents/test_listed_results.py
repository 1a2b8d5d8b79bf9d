"""Numbers in docs/real.md are those that its commands print from the lists of runs beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.vtab.own_pairs import paired_cells
from experiments.vtab.own_results import MEAN, own_results
from experiments.vtab.table_layout import mean_interval
from experiments.vtab.table_own import difference_in_words
from experiments.vtab.table_results import read_runs

DOCS = Path(__file__).parents[2] / "docs"
LISTS = sorted((DOCS / "real").glob("*_runs.csv"))


def test_there_are_lists() -> None:
    assert LISTS


@pytest.mark.parametrize("file", LISTS, ids=[file.stem for file in LISTS])
def test_accuracies_and_differences_are_on_the_page(file: Path) -> None:
    page = (DOCS / "real.md").read_text()
    (command,) = (line for line in page.splitlines() if f"--runs docs/real/{file.name}" in line)
    results = own_results(read_runs([file], "loss" if "--select loss" in command else "accuracy"))
    assert results is not None
    shown = {column: of for column, of in results.columns.items() if len(of) == 1 or column == MEAN}
    accuracies = [mean_interval(entry.samples, of)[0] for entry in results.entries for of in shown.values()]
    wanted = {interval.text(1) for interval in accuracies if interval is not None}
    wanted |= {difference_in_words(cell) for (_, column), cell in paired_cells(results).items() if column in shown}
    assert {text for text in wanted if text not in page} == set()
