"""The list of runs makes the same tables as the folders it was written from, and a damaged one is one sentence."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pandas as pd
import pytest

from experiments.vtab import table
from experiments.vtab.table_results import read_runs
from tests.experiments.vtab.results_fakes import job, metrics, write
from tests.experiments.vtab.test_table_own import ACCURACIES, LOSSES, written


def make(runs: Path, output: Path) -> Path:
    """The list that the command writes beside its tables."""
    table.main(["--runs", str(runs), "--output", str(output)])
    return output / "runs.csv"


def test_it_has_every_run_with_its_losses_by_epoch(tmp_path: Path) -> None:
    written(tmp_path / "runs")
    each = pd.read_csv(make(tmp_path / "runs", tmp_path / "out"))
    assert len(each) == 2 * 3 + 2 * 2
    (run,) = each[(each["method"] == "lora") & (each["phase"] == "final") & (each["seed"] == 1)].to_dict("records")
    assert [float(loss) for loss in run["train_losses"].split()] == LOSSES["lora", 1]
    assert run["accuracy"] == pytest.approx(100 * ACCURACIES["lora"][1])
    assert "val_losses" not in each


@pytest.mark.parametrize("held_out", [False, True])
def test_tables_and_figures_are_the_same(held_out: bool, tmp_path: Path) -> None:
    written(tmp_path / "runs", held_out=held_out)
    # an official task too, which is compared with the paper's, with reservations
    write(tmp_path / "runs", [(run, metrics(run, 0.8)) for seed in range(2) for run in [job("lora", "kitti", seed)]])
    listed = make(tmp_path / "runs", tmp_path / "one")
    again = make(listed, tmp_path / "two")
    files = sorted(file.name for file in again.parent.glob("[!.]*"))
    assert {"table.md", "own_curves.png", "own.csv", "runs.csv", "structured.png"} <= {*files}
    assert filecmp.cmpfiles(listed.parent, again.parent, files, shallow=False) == (files, [], [])
    lines = (listed.parent / "runs.csv").read_text()
    assert ("val_losses" in lines) == held_out


def test_a_run_that_is_listed_and_in_its_folder_counts_once(tmp_path: Path) -> None:
    written(tmp_path / "runs")
    listed = make(tmp_path / "runs", tmp_path / "out")
    both = table.make_tables(read_runs([tmp_path / "runs", listed]))
    assert {sample.n for entry in both.ours for sample in entry.samples.values()} == {3}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("phase", "test", r"line 2: phase must be tune or final, got test"),
        ("lr", "0", r"line 2: lr must be a number above 0, got 0.0"),
        ("lr", "x", r"is damaged"),
        ("accuracy", "171", r"line 2: accuracy must be a percentage, got 171.0"),
        ("accuracy", "", r"line 2: accuracy must be a percentage, got nan"),
        ("seed", "", r"is damaged"),
        ("loss", "low", r"is damaged"),
        ("image_size", "small", r"is damaged"),
        ("rank", "inf", r"line 2: rank must be a number of at least 1, got inf"),
        ("model", "", r"line 2: model must be a name, got nan"),
        ("experiment", "", r"line 2: experiment must be a name, got nan"),
        ("official", "perhaps", r"line 2: official must be True or False, got perhaps"),
        ("method", "ava", r"is damaged \(unknown method 'ava'"),
        ("train_losses", "1.0 -2.0", r"is damaged \(a loss is no positive number\)"),
        ("train_losses", "1.0 nan", r"is damaged \(a loss is no positive number\)"),
        ("experiment", None, r"is damaged \(no column experiment\)"),
    ],
)
def test_a_damaged_list_is_one_sentence(column: str, value: str | None, message: str, tmp_path: Path) -> None:
    written(tmp_path / "runs")
    listed = make(tmp_path / "runs", tmp_path / "out")
    frame = pd.read_csv(listed, dtype=str)
    if value is None:
        frame = frame.drop(columns=column)
    else:
        frame.loc[0, column] = value
    frame.to_csv(listed, index=False)
    with pytest.raises(ValueError, match=rf"runs\.csv.*{message}"):
        read_runs([listed])


@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe", b"{}", b"a,b\n1,2,3\n4\n"])
def test_a_file_of_something_else_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt is damaged .*: it must be a runs\.csv that"):
        read_runs([tmp_path / "notes.txt"])
