from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.methods import method_names
from eva_lightning.rl.tasks import CW10
from experiments.metaworld import table
from experiments.metaworld.finetune import EXPERIMENT
from experiments.metaworld.success import ANY_STEP, LAST_STEP
from experiments.metaworld.table_report import COLUMNS, as_report, best_ranks, our_rows, paper_rows, read_runs


def write_run(folder: Path, **changes: Any) -> dict[str, Any]:
    metrics: dict[str, Any] = {
        "experiment": EXPERIMENT,
        "task": "push-v3",
        "method": "eva",
        "rank": 4,
        "rho": 2.0,
        "seed": 0,
        "success_rate": 0.5,
        "final_success_rate": 0.25,
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
    assert set(COLUMNS) == set(CW10)
    first, second = paper_rows(23), paper_rows(24)
    assert {row.method for row in (*first, *second)} <= set(method_names("rl"))
    assert len(first) == 8
    assert [(r.method, r.rank) for r in second[:3]] == [("fft", None), ("lora", 2), ("lora", 4)]
    assert len(second) == 1 + 7 * 4
    for row in (*first, *second):
        mean = row.mean_over(COLUMNS)
        assert mean is not None
        assert row.average is not None
        # printed averages are rounded, or cut, to two digits
        assert abs(mean - row.average) <= 0.0101, row
    by_method = {row.method: row for row in first}
    assert by_method["eva-dora"].average == 0.94
    stick_pull = by_method["eva"].cells["stick-pull-v3"]
    assert stick_pull.mean == 0.63
    # printed is a standard error of 0.07 over three seeds; 4.3027 is the 97.5% point of Student's t with 2 degrees
    assert stick_pull.half == pytest.approx(0.07 * 4.3027, rel=1e-4)


def test_means_and_intervals_are_over_seeds(tmp_path: Path) -> None:
    for seed, success in enumerate((0.4, 0.5, 0.9)):
        write_run(tmp_path, seed=seed, success_rate=success)
    (row,) = our_rows(read_runs(tmp_path), ANY_STEP)
    cell = row.cells["push-v3"]
    assert cell.mean == pytest.approx(0.6)
    assert cell.half == pytest.approx(4.3027 * 0.2645751 / 3**0.5, rel=1e-4)
    assert (cell.n, row.val_loss) == (3, pytest.approx(0.1))
    assert row.average is None


def test_interquartile_means_are_over_the_tasks_that_all_methods_have(tmp_path: Path) -> None:
    for seed, success in enumerate((0.0, 0.5, 0.6, 1.0)):
        write_run(tmp_path, seed=seed, success_rate=success)
        write_run(tmp_path, seed=seed, method="lora", rho=None, success_rate=success / 2)
    write_run(tmp_path, task="hammer-v3", success_rate=0.0)  # of one method alone
    rows = {row.method: row for row in our_rows(read_runs(tmp_path), ANY_STEP)}
    range_ = rows["eva"].iqm_over(["push-v3"])
    assert range_ is not None
    assert range_.mean == pytest.approx(0.55)
    assert range_.low < 0.55 < range_.high
    line = next(line for line in as_report(read_runs(tmp_path)).splitlines() if "**ours** LoRA (r=4), any step" in line)
    assert "0.28 [" in line


def test_best_rank_is_chosen_by_validation_loss(tmp_path: Path) -> None:
    write_run(tmp_path, rank=2, success_rate=1.0, val_loss=[{"updates": 50, "val_loss": 0.3}])
    write_run(tmp_path, rank=4, success_rate=0.1, val_loss=[{"updates": 50, "val_loss": 0.2}])
    (row,) = best_ranks(our_rows(read_runs(tmp_path)))
    assert row.rank == 4


def test_command_writes_markdown_csv_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    for task in ("push-v3", "window-close-v3"):
        write_run(runs, task=task)
        write_run(runs, task=task, method="fft", rank=None, rho=None, success_rate=0.75, final_success_rate=0.5)
        write_run(runs, task=task, method="scratch", rank=None, rho=None, success_rate=0.0)
    write_run(runs, seed=1, success_rate=None, final_success_rate=None)  # not rolled out
    (runs / "other").mkdir()
    (runs / "other" / "metrics.json").write_text('{"accuracy": 1}')
    text = table.main(["--runs", str(runs), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "6 runs" in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {15}
    paper, ours = (next(line for line in lines if f"{mark} FFT" in line) for mark in ("*paper*", "**ours**"))
    assert lines.index(ours) == lines.index(paper) + 1
    assert [cell.strip() for cell in paper.split("|")][-4:-1] == ["0.92", "1.00", "–"]
    assert [cell.strip() for cell in ours.split("|")][-3:-1] == ["0.50", "0.50 [0.50, 0.50]"]
    below = lines[lines.index(ours) + 1]
    assert below.startswith("| **ours** FFT, any step")
    assert [cell.strip() for cell in below.split("|")][-3:-1] == ["0.75", "0.75 [0.75, 0.75]"]
    assert "**ours** EVA (r=4), last step" in text
    assert "The paper's numbers belong beside success at the last step" in text
    assert 'counts info["success"] of the step that ends an episode' in text
    assert "Table 23 is in steps of 1/30" in text
    assert "2 tasks run here by every method: push, window-close" in text
    with (tmp_path / "out" / "table.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert {cell["source"] for cell in cells} == {"paper", "ours"}
    mine = [c for c in cells if c["source"] == "ours" and c["method"] == "eva" and c["table"] == "24"]
    assert [(c["solved_at"], c["task"], c["success"], c["rho"], c["half"]) for c in mine] == [
        ("last step", "push-v3", "0.25", "2.0", ""),
        ("last step", "window-close-v3", "0.25", "2.0", ""),
        ("any step", "push-v3", "0.5", "2.0", ""),
        ("any step", "window-close-v3", "0.5", "2.0", ""),
    ]
    assert (tmp_path / "out" / "table.png").stat().st_size > 5000


def test_the_definition_that_leads_can_be_chosen(tmp_path: Path) -> None:
    write_run(tmp_path, method="lora", rho=None)
    for option, expected in (("any", ["any step", "last step"]), ("final", ["last step", "any step"])):
        text = table.main(["--runs", str(tmp_path), "--success", option])
        lines = [line for line in text.splitlines() if "**ours** LoRA (r=4)" in line]
        assert [line.split("|")[1].rpartition(", ")[2].strip() for line in lines] == 2 * expected
    with pytest.raises(ValueError, match="unknown success 'last'"):
        table.main(["--runs", str(tmp_path), "--success", "last"])


def test_runs_that_lack_a_definition_have_a_dash(tmp_path: Path) -> None:
    """Made before success at the last step was noted, or by something that does not know the one of any step."""
    for seed in range(2):
        write_run(tmp_path / "a", seed=seed, final_success_rate=None, success_rate=0.5 + seed / 4)
        path = next((tmp_path / "a").glob(f"*-{seed}/metrics.json"))
        path.write_text(path.read_text().replace('"final_success_rate": null, ', ""))
        write_run(tmp_path / "b", seed=seed, success_rate=None)
    for folder, known in (("a", ANY_STEP), ("b", LAST_STEP)):
        text = table.main(["--runs", str(tmp_path / folder)])
        for definition in (ANY_STEP, LAST_STEP):
            line = next(each for each in text.splitlines() if f"**ours** EVA (r=4), {definition.title}" in each)
            cells = [cell.strip() for cell in line.split("|")][2:-1]
            assert (set(cells) == {"–"}) == (definition is not known), line
        (row,) = our_rows(read_runs(tmp_path / folder), known)
        assert row.cells["push-v3"].n == 2


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.command_line(["--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no finished runs below {tmp_path}: make some with")
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(ValueError, match="are both eva on push-v3 with seed 0: keep runs"):
        read_runs(tmp_path)
    broken = tmp_path / "c" / "metrics.json"
    broken.parent.mkdir()
    broken.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_runs(tmp_path / "c")
