from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.methods import method_names
from eva_lightning.rl.tasks import CW10
from experiments.metaworld import table


def write_run(folder: Path, **changes: Any) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "experiment": table.EXPERIMENT,
        "task": "push-v3",
        "method": "eva",
        "rank": 4,
        "rho": 2.0,
        "seed": 0,
        "success_rate": 0.5,
        "mean_return": 1000.0,
        "val_loss": [{"updates": 10, "val_loss": 0.2}, {"updates": 50, "val_loss": 0.1}],
        "total_parameters": 607_000,
        "train_episodes": 20,
        "horizon": 200,
        "max_steps": 50,
        "episodes": 20,
        **changes,
    }
    path = folder / "-".join(str(metrics[k]) for k in ("task", "method", "rank", "rho", "seed"))
    path.mkdir(parents=True)
    (path / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def test_paper_tables_are_complete_and_consistent() -> None:
    assert set(table.COLUMNS) == set(CW10)
    assert set(table.LABELS) == set(method_names("rl"))
    first, second = table.paper_rows(23), table.paper_rows(24)
    assert len(first) == 8
    assert [(r.method, r.rank) for r in second[:3]] == [("fft", None), ("lora", 2), ("lora", 4)]
    assert len(second) == 1 + 7 * 4
    for row in (*first, *second):
        mean = row.mean_over(table.COLUMNS)
        assert mean is not None
        assert row.average is not None
        # printed averages are rounded, or cut, to two digits
        assert abs(mean - row.average) <= 0.0101, row
    by_method = {row.method: row for row in first}
    assert by_method["eva-dora"].average == 0.94
    assert by_method["eva"].cells["stick-pull-v3"].success == 0.63
    assert by_method["eva"].cells["stick-pull-v3"].stderr == 0.07


def test_mean_and_standard_error_are_over_seeds(tmp_path: Path) -> None:
    for seed, success in enumerate((0.4, 0.5, 0.9)):
        write_run(tmp_path, seed=seed, success_rate=success)
    (row,) = table.our_rows(table.read_runs(tmp_path))
    cell = row.cells["push-v3"]
    assert cell.success == pytest.approx(0.6)
    assert cell.stderr == pytest.approx(0.2645751 / 3**0.5)
    assert (cell.seeds, cell.val_loss) == (3, pytest.approx(0.1))
    assert row.average is None


def test_best_rank_is_chosen_by_validation_loss(tmp_path: Path) -> None:
    write_run(tmp_path, rank=2, success_rate=1.0, val_loss=[{"updates": 50, "val_loss": 0.3}])
    write_run(tmp_path, rank=4, success_rate=0.1, val_loss=[{"updates": 50, "val_loss": 0.2}])
    (row,) = table.best_ranks(table.our_rows(table.read_runs(tmp_path)))
    assert row.rank == 4


def test_command_writes_markdown_csv_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for task in ("push-v3", "window-close-v3"):
        write_run(runs, task=task)
        write_run(runs, task=task, method="fft", rank=None, rho=None, success_rate=0.75)
        write_run(runs, task=task, method="scratch", rank=None, rho=None, success_rate=0.0)
    write_run(runs, seed=1, success_rate=None)  # not rolled out
    (runs / "other").mkdir()
    (runs / "other" / "metrics.json").write_text('{"accuracy": 1}')
    text = table.main(["--runs", str(runs), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "6 runs" in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {15, 16}
    paper = next(line for line in lines if "*paper*" in line and "| FFT" in line)
    ours = next(line for line in lines if "**ours**" in line and "**FFT**" in line)
    assert lines.index(ours) == lines.index(paper) + 1
    assert paper.rstrip("| ").endswith("0.92 | 1.00")
    assert ours.rstrip("| ").endswith("**0.75**")
    assert "**EVA ρ=2 (r=4)**" in text
    assert "2 tasks run here by every method: push, window-close" in text
    with (tmp_path / "out" / "table.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert {cell["source"] for cell in cells} == {"paper", "ours"}
    mine = [c for c in cells if c["source"] == "ours" and c["method"] == "eva" and c["table"] == "24"]
    assert [(c["task"], c["success"], c["rho"], c["stderr"]) for c in mine] == [
        ("push-v3", "0.5", "2.0", ""),
        ("window-close-v3", "0.5", "2.0", ""),
    ]
    assert (tmp_path / "out" / "table.png").stat().st_size > 5000


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.command_line(["--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no finished runs below {tmp_path}: make some with")
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(ValueError, match="are both eva on push-v3 with seed 0: keep runs"):
        table.read_runs(tmp_path)
    broken = tmp_path / "c" / "metrics.json"
    broken.parent.mkdir()
    broken.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        table.read_runs(tmp_path / "c")
