from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from eva_lightning.vision.data.tasks import TASKS
from experiments.vtab.grid import PAPER, Grid, Point, choose, load_grid, override
from tests.paths import ROOT

CONFIGS = ROOT / "configs/vtab"


def test_papers_grid_has_its_1140_and_95_runs() -> None:
    """Section D.2: 19 datasets * 5 learning rates * 4 ranks * 3 seeds, and 19 datasets * 5 seeds."""
    tune, final = PAPER.sizes(adapts=True)
    assert (len(TASKS) * tune, len(TASKS) * final) == (1140, 95)
    assert PAPER.lrs == (2.5e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4)
    assert PAPER.ranks == (2, 4, 8, 16)
    assert PAPER.sizes(adapts=False) == (15, 5)
    assert {point.rank for point in PAPER.points(adapts=False)} == {None}
    assert load_grid("paper") == load_grid(str(CONFIGS / "grid_paper.yaml")) == PAPER


def test_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("lrs: [1e-3, 0.5]\nranks: 3\ntune_seeds: 2\nfinal_seeds: [7, 8]\n")  # YAML 1.1 reads 1e-3 as a word
    assert load_grid(str(file)) == Grid((1e-3, 0.5), (3,), (0, 1), (7, 8))
    changed = override(load_grid(str(file)), lrs="2e-3", ranks="2,4", tune_seeds="5,", final_seeds="0")
    assert changed == Grid((2e-3,), (2, 4), (5,), ())
    assert override(PAPER, lrs=None, ranks=None, tune_seeds=None, final_seeds=None) == PAPER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrs: []", "lrs of the grid must hold at least one value"),
        ("lrs: [1e-3, 0.001]", r"lrs of the grid must differ, got 0\.001, 0\.001"),
        ("lrs: [-1]", r"lrs of the grid must be numbers above 0, got -1\.0"),
        ("lrs: [fast]", r"lrs must be numbers, got \['fast'\]"),
        ("ranks: [0]", "ranks of the grid must be at least 1, got 0"),
        ("ranks: [2.5]", r"ranks must be whole numbers, got \[2\.5\]"),
        ("ranks: [true]", r"ranks must be whole numbers, got \[True\]"),
        ("tune_seeds: 0", "tune_seeds of the grid must hold at least one value"),
        ("tune_seeds: [-1]", "seeds of the grid must be at least 0, got -1"),
        ("rank: [2]", "unknown key 'rank': did you mean ranks"),
        ("- 1", "must be a mapping with any of lrs, ranks, tune_seeds, final_seeds"),
        ("a: [", "is no YAML"),
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
    with pytest.raises(ValueError, match="ranks must be whole numbers, got 'high'"):
        override(PAPER, ranks="high")


def rows(values: dict[Point, list[tuple[float, float | None]]]) -> list[dict[str, Any]]:
    return [
        {"lr": point.lr, "rank": point.rank, "status": "done", "accuracy": accuracy, "loss": loss}
        for point, runs in values.items()
        for accuracy, loss in runs
    ]


LOW, HIGH, FAST = Point(1e-3, 2), Point(1e-3, 16), Point(2e-3, 2)


def test_best_mean_over_the_seeds_wins() -> None:
    found = rows({LOW: [(0.9, 1.0), (0.1, 1.0)], HIGH: [(0.6, 9.0), (0.6, 9.0)]})
    choice = choose(found, [LOW, HIGH], 2)
    assert choice is not None
    assert (choice.point, choice.accuracy) == (HIGH, pytest.approx(0.6))
    assert choice.candidates == {LOW: pytest.approx(0.5), HIGH: pytest.approx(0.6)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({LOW: (0.5, 2.0), HIGH: (0.5, 1.0)}, HIGH),  # the lower loss
        ({HIGH: (0.5, 1.0), LOW: (0.5, 1.0)}, LOW),  # the smaller rank
        ({FAST: (0.5, 1.0), LOW: (0.5, 1.0)}, LOW),  # the smaller rate
        ({HIGH: (0.5, 1.0), FAST: (0.5, 1.0)}, FAST),  # the rank comes before the rate
        ({LOW: (0.5, None), HIGH: (0.5, 50.0)}, HIGH),  # what diverged comes last
    ],
)
def test_ties(values: dict[Point, tuple[float, float | None]], expected: Point) -> None:
    for order in itertools.permutations(values):
        choice = choose(rows({p: [values[p]] * 3 for p in order}), list(order), 3)
        assert choice is not None
        assert choice.point == expected


def test_choice_does_not_depend_on_the_order_in_which_runs_come_in() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point."""
    points = [Point(lr, rank) for lr in PAPER.lrs for rank in PAPER.ranks]
    accuracies = [0.1, 0.2, 0.3]
    found = rows({p: [(a, 1.0) for a in random.Random(i).sample(accuracies, 3)] for i, p in enumerate(points)})
    for seed in range(20):
        random.Random(seed).shuffle(found)
        choice = choose(found, points, 3)
        assert choice is not None
        assert choice.point == Point(2.5e-4, 2)


def test_only_complete_points_of_this_grid_count() -> None:
    found = rows({LOW: [(0.9, 1.0)], HIGH: [(0.5, 1.0)] * 2, FAST: [(1.0, 0.0)] * 2})
    choice = choose(found, [LOW, HIGH], 2)
    assert choice is not None
    assert choice.point == HIGH
    found[1]["status"] = "failed"
    assert choose(found, [LOW, HIGH], 2) is None
    assert choose([], [LOW], 1) is None


def test_methods_without_rank() -> None:
    found = rows({Point(lr, None): [(accuracy, 1.0)] for lr, accuracy in ((1e-3, 0.5), (5e-4, 0.75))})
    choice = choose(found, Grid(lrs=(1e-3, 5e-4)).points(adapts=False), 1)
    assert choice is not None
    assert choice.point == Point(5e-4, None)
