"""Tables of folders that are none of VTAB-1K's tasks: apart from the paper's numbers, with SciPy's intervals."""

from __future__ import annotations

import numpy as np
from scipy import stats

from experiments.vtab.table import make_tables
from tests.experiments.vtab.results_fakes import Run, frame, job, metrics

ACCURACIES = {"lora": [0.70, 0.72, 0.71], "eva:1": [0.75, 0.74, 0.78]}


def runs(*tasks: str) -> list[Run]:
    return [
        (found, metrics(found, accuracy, group="other", official_sizes=False))
        for task in tasks
        for method, accuracies in ACCURACIES.items()
        for seed, accuracy in enumerate(accuracies)
        for found in [job(method, task, seed)]
    ]


def test_other_folders_have_a_table_of_their_own() -> None:
    tables = make_tables(frame(runs("mine", "yours")))
    (sheet,) = tables.sheets
    assert (sheet.name, sheet.columns) == ("own", ("mine", "yours", "mean"))
    assert all(line.source == "ours" for line in sheet.lines)
    lines = {line.label: line.cells for line in sheet.lines}
    low, high = stats.t.interval(0.95, 2, np.mean(ACCURACIES["lora"]), stats.sem(ACCURACIES["lora"]))
    assert lines["LoRA"]["mine"] == f"71.0 ± {50 * (high - low):.1f}"
    welch = stats.ttest_ind(ACCURACIES["eva:1"], ACCURACIES["lora"], equal_var=False)
    low, high = (100 * bound for bound in welch.confidence_interval(0.95))
    assert low > 0
    assert lines["EVA (ρ = 1) − LoRA"]["yours"] == f"+{(low + high) / 2:.1f} ± {(high - low) / 2:.1f}*"


def test_they_are_never_in_the_tables_of_the_paper() -> None:
    official = [(run, metrics(run, 0.8)) for seed in range(3) for run in [job("lora", "caltech101", seed)]]
    tables = make_tables(frame([*official, *runs("mine")]))
    own, *others = tables.sheets
    assert own.name == "own"
    assert "mean" not in own.columns
    assert {sheet.name for sheet in others} == {"table20", "table21", "table25", "differences"}
    for sheet in others:
        assert "mine" not in sheet.columns
        assert [line.label for line in sheet.lines if line.source == "ours" and "EVA" in line.label] == []
