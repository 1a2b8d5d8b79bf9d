from __future__ import annotations

import math
from pathlib import Path

import pytest

from eva_lightning.vision.data.tasks import TASKS
from experiments.vtab.grid import PAPER, Grid, load_grid, score
from tests.paths import ROOT

CONFIGS = ROOT / "configs/vtab"


def test_papers_grid_has_its_1140_and_95_runs() -> None:
    """Section D.2: 19 datasets * 5 learning rates * 4 ranks * 3 seeds, and 19 datasets * 5 seeds."""
    tune, final = PAPER.sizes(adapts=True)
    assert (len(TASKS) * tune, len(TASKS) * final) == (1140, 95)
    assert PAPER.lrs == (2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4)
    assert PAPER.ranks == (2, 4, 8, 16)
    assert PAPER.sizes(adapts=False) == (15, 5)
    assert PAPER.sizes(adapts=True, searches_rho=True) == (2 * 60, 5)
    # section G: "we always search for rho = 1 and rho = 2"
    assert {point.get("rho") for point in PAPER.points(adapts=True, searches_rho=True)} == {1.0, 2.0}
    assert {point.get("rho") for point in PAPER.points(adapts=True)} == {None}
    assert {point.get("rank") for point in PAPER.points(adapts=False)} == {None}
    assert load_grid("paper") == load_grid(str(CONFIGS / "grid_paper.yaml")) == PAPER


def test_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("lrs: [1e-3, 0.5]\nranks: 3\ntune_seeds: 2\nfinal_seeds: [7, 8]\n")  # YAML 1.1 reads 1e-3 as a word
    assert load_grid(str(file)) == Grid((1e-3, 0.5), (3,), (0, 1), (7, 8))
    changed = load_grid(str(file), lrs=(2e-3,), ranks=(2, 4), tune_seeds=(5,), final_seeds=0)
    assert changed == Grid((2e-3,), (2, 4), (5,), ())
    assert load_grid("paper", lrs=None, ranks=None, tune_seeds=None, final_seeds=None) == PAPER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrs: []", "lrs of the grid must hold at least one value"),
        ("lrs: [1e-3, 0.001]", r"lrs of the grid must differ, got 0\.001, 0\.001"),
        ("lrs: [-1]", r"lrs must be a number above 0, got -1\.0"),
        ("lrs: [fast]", "lrs must be a number above 0, got 'fast'"),
        ("ranks: [0]", "ranks must be a whole number of at least 1, got 0"),
        ("ranks: [2.5]", r"ranks must be a whole number of at least 1, got 2\.5"),
        ("ranks: [true]", "ranks must be a whole number of at least 1, got True"),
        ("rhos: [0.5]", r"rhos must be a number of at least 1, got 0\.5"),
        ("tune_seeds: 0", "tune_seeds of the grid must hold at least one value"),
        ("tune_seeds: [-1]", "tune_seeds must be a whole number of at least 0, got -1"),
        ("rank: [2]", "unknown key 'rank': did you mean ranks"),
        ("- 1", "must be a mapping with any of lrs, ranks, tune_seeds, final_seeds, rhos"),
        ("a: [", r"g\.yaml is damaged \(line 2"),
    ],
)
def test_wrong_grid_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_grid(str(file))
    assert len(str(error.value).splitlines()) == 1


def test_unknown_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown grid 'papr': did you mean paper"):
        load_grid("papr")
    with pytest.raises(FileNotFoundError, match=r"grid file .*no\.yaml does not exist"):
        load_grid(str(tmp_path / "no.yaml"))


def test_runs_compare_by_accuracy_then_by_loss() -> None:
    runs = [{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 0.5}, {"accuracy": 0.9, "loss": 9.0}]
    assert [run["loss"] for run in sorted(runs, key=score)] == [9.0, 0.5, 1.0]
    # a loss that is no number (diverged) comes last
    assert score({"accuracy": 0.5, "loss": math.nan}) == score({"accuracy": 0.5, "loss": None}) == (-0.5, math.inf)
    assert score({"accuracy": 0.5, "loss": 1.25}, "loss") == (1.25, -0.5)
    assert score({"accuracy": 0.5, "loss": math.nan}, "loss") == (math.inf, -0.5)
