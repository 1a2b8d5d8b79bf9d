"""Tables of folders that are not official draws: apart from the paper's numbers, with SciPy's intervals and tests."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped]

from experiments.runner.jobs import Phase, Point
from experiments.vtab import table
from experiments.vtab.own_curves import read_histories
from experiments.vtab.own_figures import curves_figure
from experiments.vtab.own_results import own_results
from experiments.vtab.table import make_tables
from experiments.vtab.table_layout import Sheet
from experiments.vtab.table_own import own_csv
from experiments.vtab.table_results import read_runs
from experiments.vtab.table_write import as_latex, as_markdown
from tests.experiments.vtab.results_fakes import Run, frame, job, metrics, write

ACCURACIES = {"lora": [0.70, 0.72, 0.71], "eva:1": [0.75, 0.74, 0.78], "dora": [0.71, 0.72, 0.74]}
OWN = {"group": "other", "official_sizes": False, "train_images": 480, "evaluation_images": 711}


def runs(*tasks: str, methods: Any = tuple(ACCURACIES), **changes: Any) -> list[Run]:
    return [
        (found, metrics(found, accuracy, **OWN, evaluation_seconds=2.0))
        for task in tasks
        for method in methods
        for seed, accuracy in enumerate(ACCURACIES.get(method, ACCURACIES["lora"]))
        for found in [job(method, task, seed, **changes)]
    ]


def sheets(tables: table.Tables) -> dict[str, Sheet]:
    return {sheet.name: sheet for sheet in tables.sheets}


def cells(sheet: Sheet) -> dict[str, Any]:
    return {line.label: line.cells for line in sheet.lines}


def difference(method: str) -> np.ndarray:
    return 100 * (np.array(ACCURACIES[method]) - ACCURACIES["lora"])


def test_other_folders_have_tables_of_their_own() -> None:
    tables = make_tables(frame(runs("mine", "yours")))
    found = sheets(tables)
    assert list(found) == ["own", "own-differences", "own-ranks", "own-rates", "own-seconds", "own-folders"]
    assert found["own"].columns == ("mine°", "yours°", "mean")
    assert all(line.source == "ours" for sheet in tables.sheets for line in sheet.lines)
    for sheet in tables.sheets:
        assert "°: a folder that is not the official VTAB-1K draw of any task, or only a part of one." in sheet.caption
        assert "dinov2_g14, pre-trained weights of the hub, 224 px, 30 epochs" in sheet.caption
    low, high = stats.t.interval(0.95, 2, np.mean(ACCURACIES["lora"]), stats.sem(ACCURACIES["lora"]))
    assert cells(found["own"])["LoRA"]["mine°"] == f"71.0 ± {50 * (high - low):.1f}"
    assert cells(found["own-folders"])["mine°"] == {
        "group": "not said", "official draw": "no", "training images": "480", "test images": "711", "epochs": "30",
        "px": "224",
    }  # fmt: skip
    assert cells(found["own-seconds"])["LoRA"]["yours°"] == "2"


def test_differences_are_paired_and_corrected_over_all_folders() -> None:
    shown = cells(sheets(make_tables(frame(runs("mine", "yours"))))["own-differences"])
    assert list(shown) == ["DoRA − LoRA", "EVA (ρ = 1) − LoRA"]
    p = {method: stats.ttest_rel(ACCURACIES[method], ACCURACIES["lora"]).pvalue for method in ("dora", "eva:1")}
    family = multipletests([p["dora"], p["dora"], p["eva:1"], p["eva:1"]], method="holm")[1]
    for method, label, corrected in (("dora", "DoRA", family[0]), ("eva:1", "EVA (ρ = 1)", family[2])):
        values = difference(method)
        half = stats.sem(values) * stats.t.ppf(0.975, 2)
        assert shown[f"{label} − LoRA"]["mine°"] == f"+{values.mean():.1f} ± {half:.1f} ({corrected:.3f})"
    # the mean over folders is a family of its own: here the same differences twice, so the same p before correction
    alone = multipletests([p["dora"], p["eva:1"]], method="holm")[1]
    assert f"({alone[1]:.3f})" in shown["EVA (ρ = 1) − LoRA"]["mean"]
    assert "one family of 4 tests" in sheets(make_tables(frame(runs("mine", "yours"))))["own-differences"].caption


def test_a_mean_over_some_of_its_folders_is_in_no_family_of_tests() -> None:
    some = [*runs("mine", "yours", methods=("lora", "eva:1")), *runs("mine", methods=("dora",))]
    shown = cells(sheets(make_tables(frame(some)))["own-differences"])
    p = stats.ttest_rel(ACCURACIES["eva:1"], ACCURACIES["lora"]).pvalue
    assert shown["EVA (ρ = 1) − LoRA"]["mean"].endswith(f"({p:.3f})")  # the only one, so as it is
    assert shown["DoRA − LoRA"]["mean"].endswith(" (1/2)")
    assert shown["DoRA − LoRA"]["mean"].count("(") == 1


def test_a_star_needs_the_corrected_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACCURACIES, "eva:1", [0.80, 0.821, 0.811])
    shown = cells(sheets(make_tables(frame(runs("mine", methods=("lora", "eva:1")))))["own-differences"])
    assert shown["EVA (ρ = 1) − LoRA"]["mine°"].endswith("*")
    wide = cells(sheets(make_tables(frame(runs(*(f"f{i}" for i in range(60))))))["own-differences"])
    assert not any(text.endswith("*") for text in (wide["DoRA − LoRA"][f"f{i}°"] for i in range(60)))


def test_ranks_are_over_folders_that_methods_share() -> None:
    some = [*runs("a", "b"), *runs("c", "d", methods=("lora", "eva:1"))]
    found = sheets(make_tables(frame(some)))["own-ranks"]
    assert found.columns == ("3 methods, 2 folders (a, b)", "2 methods, 4 folders (a, b, c, d)")
    first, second = found.columns
    assert cells(found)["EVA (ρ = 1)"][first].startswith("1.0 [")
    assert cells(found)["LoRA"][second].startswith("2.0 [")
    assert second not in cells(found)["DoRA"]


def test_groups_have_means_where_they_are_not_all() -> None:
    tables = make_tables(
        frame(runs("mine", "yours", "maps")), groups=["mine=natural", "yours=natural", "maps=structured"]
    )
    assert sheets(tables)["own"].columns == ("maps°", "mine°", "yours°", "natural, mean", "mean")
    for words, message in ((["mine"], "groups takes folder=group"), (["mine=nature"], "unknown group 'nature'")):
        with pytest.raises(ValueError, match=message):
            make_tables(frame(runs("mine")), groups=words)


def test_a_folder_named_like_a_task_but_of_other_sizes_is_no_official_draw() -> None:
    tables = make_tables(frame([(run, {**found, "group": "natural"}) for run, found in runs("caltech101")]))
    assert {sheet.name for sheet in tables.sheets} == {
        f"own{x}" for x in ("", "-differences", "-rates", "-seconds", "-folders")
    }
    assert sheets(tables)["own"].columns == ("caltech101°",)
    assert cells(sheets(tables)["own-folders"])["caltech101°"]["group"] == "natural"
    assert not tables.beside


def test_a_learning_rate_at_the_edge_of_the_grid_is_marked() -> None:
    trials = [job("lora", "mine", 0, Point.of(lr=lr, rank=8), "tune") for lr in (1e-3, 3e-3)]
    tuning = [(run, metrics(run, accuracy, **OWN)) for run, accuracy in zip(trials, (0.9, 0.5), strict=True)]
    found = sheets(make_tables(frame([*runs("mine", methods=("lora",)), *tuning])))
    assert cells(found["own-rates"])["LoRA"]["mine°"] == "0.001 (lowest)"


def test_each_rho_with_final_runs_everywhere_stands_for_the_chosen_one() -> None:
    def searched(*rhos: float) -> list[Run]:
        points = [Point.of(lr=1e-3, rank=8, rho=rho) for rho in (1.0, 2.0)]
        trials = [(r, metrics(r, 0.6, **OWN)) for point in points for r in [job("eva", "mine", 0, point, "tune")]]
        finals = [job("eva", "mine", seed, Point.of(lr=1e-3, rank=8, rho=rho)) for rho in rhos for seed in (0, 1)]
        return [*trials, *((run, metrics(run, 0.7, **OWN)) for run in finals)]

    def labels(runs: list[Run], **how: Any) -> list[str]:
        return [line.label for line in sheets(make_tables(frame(runs), **how))["own"].lines]

    assert labels(searched(1.0)) == ["EVA", "EVA: ρ chosen"]
    assert labels(searched(1.0, 2.0)) == ["EVA (ρ = 2)", "EVA (ρ = 1)"]
    assert labels(searched(1.0), each_rho=True) == ["EVA", "EVA: ρ chosen", "EVA (ρ = 1)"]


def test_they_are_never_in_the_tables_of_the_paper() -> None:
    official = [(run, metrics(run, 0.8)) for seed in range(3) for run in [job("lora", "caltech101", seed)]]
    tables = make_tables(frame([*official, *runs("mine")]))
    others = [sheet for sheet in tables.sheets if not sheet.is_own]
    assert sheets(tables)["own"].columns == ("mine°",)
    assert {sheet.name for sheet in others} == {"table20", "table21", "table25", "differences"}
    for sheet in others:
        assert "mine" not in sheet.columns
        assert [line.label for line in sheet.lines if line.source == "ours" and "EVA" in line.label] == []


def test_csv_and_latex_have_every_value() -> None:
    own = own_results(frame(runs("mine", "yours")))
    assert own is not None
    rows = list(csv.DictReader(io.StringIO(own_csv(own))))
    (row,) = [r for r in rows if (r["kind"], r["method"], r["column"]) == ("difference", "EVA (ρ = 1)", "mine°")]
    assert float(row["value"]) == pytest.approx(difference("eva:1").mean(), abs=1e-5)
    assert float(row["p"]) == pytest.approx(stats.ttest_rel(ACCURACIES["eva:1"], ACCURACIES["lora"]).pvalue, abs=1e-5)
    assert {r["kind"] for r in rows} == {"accuracy", "difference", "rank", "lr", "seconds"}
    made = make_tables(frame(runs("mine", "yours")))
    for text in as_latex(made.sheets, made.notes).values():
        assert text.isascii()
        assert "?" not in text
    text = as_markdown(made.sheets, made.notes, [])
    assert text.startswith("# Folders of images, measured here")
    assert "*paper*" not in text


LOSSES = {
    ("lora", 0): [2.0, 1.0, 0.5], ("lora", 1): [2.2, 1.2, 0.6], ("lora", 2): [2.1, 1.1, 0.6],
    ("eva:1", 0): [1.8, 0.8, 0.5], ("eva:1", 1): [2.1, 0.9, 0.7], ("eva:1", 2): [2.0, 1.0, 0.4],
}  # fmt: skip


def written(root: Path, held_out: bool = False) -> pd.DataFrame:
    """Runs on disk with their losses by epoch: tuning at two rates, then three final seeds."""
    trials = [job(m, "mine", 0, Point.of(lr=lr, rank=8), "tune") for m in ("lora", "eva:1") for lr in (1e-3, 3e-3)]
    tuning = [(run, metrics(run, 0.9 if run.tags["lr"] == 1e-3 else 0.5, **OWN)) for run in trials]
    made = [*runs("mine", methods=("lora", "eva:1")), *tuning]
    for folder, (run, _) in zip(write(root, made), made, strict=True):
        scale = 1.0 if run.tags["lr"] == 1e-3 else 0.5
        values = [scale * loss for loss in LOSSES[run.tags["method"], run.tags["seed"]]]
        val = [loss + 1 if held_out and run.phase == "tune" else "" for loss in values]
        lines = [f"{e},{a},0.5,{b},,0.001,1.0" for e, (a, b) in enumerate(zip(values, val, strict=True), start=1)]
        header = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds"
        (folder / "metrics.csv").write_text("\n".join([header, *lines]) + "\n")
    return read_runs([root])


def test_losses_by_epoch_at_equal_and_at_tuned_rates(tmp_path: Path) -> None:
    found = sheets(make_tables(written(tmp_path)))
    equal, tuned = found["own-train-equal"], found["own-train-tuned"]
    assert equal.columns == ("lr 0.001", "lr 0.003")
    assert cells(equal)["epoch 1: LoRA"] == {"lr 0.001": "2.000", "lr 0.003": "1.000"}
    assert cells(equal)["epoch 2: EVA (ρ = 1)"]["lr 0.003"] == "−20.0% (1/1)"
    assert cells(equal)["epoch 3: EVA (ρ = 1)"]["lr 0.001"] == "+0.0% (0/1)"
    ratios = [LOSSES["eva:1", seed][1] / LOSSES["lora", seed][1] for seed in range(3)]
    low, high = np.exp(stats.t.interval(0.95, 2, np.log(ratios).mean(), stats.sem(np.log(ratios))))
    mean, low, high = (f"{100 * ratio - 100:+.1f}".replace("-", "−") for ratio in (stats.gmean(ratios), low, high))
    assert cells(tuned)["epoch 2: EVA (ρ = 1)"]["mine°"] == f"{mean} [{low}, {high}]% (1/1)"
    assert "own-val-equal" not in found
    with_val = sheets(make_tables(written(tmp_path / "more", held_out=True)))["own-val-equal"]
    assert cells(with_val)["epoch 1: EVA (ρ = 1)"]["lr 0.001"] == "−6.7% (1/1)"


def test_a_loss_that_diverged_has_no_percentage(tmp_path: Path) -> None:
    found = written(tmp_path)
    (run,) = found[(found["method"] == "eva:1") & (found["phase"] == "final") & (found["seed"] == 0)]["place"]
    (Path(run) / "metrics.csv").write_text("epoch,train_loss,val_loss\n1,1.8,\n2,inf,\n3,inf,\n")
    tuned = cells(sheets(make_tables(read_runs([tmp_path])))["own-train-tuned"])
    assert tuned["epoch 2: EVA (ρ = 1)"]["mine°"].startswith("not finite (")


def test_losses_at_tuned_rates_are_of_the_runs_that_count(tmp_path: Path) -> None:
    written(tmp_path)
    # final runs of another rate, which tuning does not prefer, as after a sweep with another --select
    made = [
        (run, metrics(run, 0.1, **OWN))
        for run in [job("lora", "mine", s, Point.of(lr=3e-3, rank=8), "final") for s in range(3)]
    ]
    for folder in write(tmp_path, made):
        (folder / "metrics.csv").write_text("epoch,train_loss,val_loss\n1,90,\n2,90,\n3,90,\n")
    tuned = sheets(make_tables(read_runs([tmp_path])))["own-train-tuned"]
    assert cells(tuned)["epoch 1: LoRA"]["mine°"].startswith("2.100 ")
    own = own_results(read_runs([tmp_path]))
    assert own is not None
    *_, final = curves_figure(own, read_histories(own)).axes
    assert final.get_lines()[0].get_ydata()[0] == pytest.approx(stats.gmean([2.0, 2.2, 2.1]))


def test_the_command_writes_them_with_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "runs")
    words = [
        "--runs",
        str(tmp_path / "runs"),
        "--output",
        str(tmp_path / "out"),
        "--about",
        "Weights of somebody else.",
    ]
    table.main([*words, "--groups", "mine=natural"])
    files = {file.name for file in (tmp_path / "out").glob("[!.]*")}
    assert {"table.md", "own.csv", "own_curves.png", "own_differences.png", "own-train-equal.tex"} <= files
    assert "natural.png" not in files
    for name in ("own_curves.png", "own_differences.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 150
        assert (tmp_path / "out" / name).stat().st_size < 300_000
    assert "Weights of somebody else." in (tmp_path / "out/table.md").read_text()
    assert max(map(len, capsys.readouterr().out.splitlines()[:-1])) <= 120


@pytest.mark.parametrize(
    "text",
    [
        "epoch,train_loss\n",
        "epoch,train_loss,val_loss\n1,nan,\n",
        "epoch,train_loss,val_loss\n1,1,\n1,1,\n",
        "\0\0",
        "",
    ],
    ids=["column", "nan", "twice", "bytes", "empty"],
)
def test_a_damaged_history_is_one_sentence(text: str, tmp_path: Path) -> None:
    found = written(tmp_path)
    next(tmp_path.rglob("metrics.csv")).write_text(text)
    own = own_results(found)
    assert own is not None
    with pytest.raises(
        ValueError, match=r"metrics\.csv .*damaged.*: delete the folder of this run and rerun the sweep"
    ):
        read_histories(own)


def test_a_sweep_notes_the_held_out_loss_of_tuning_runs_on_request() -> None:
    """The same runs by their identity, whether it does or not."""
    point = Point.of(lr=1e-3, rank=8)
    phases: tuple[Phase, ...] = ("tune", "final")
    for phase, asked in itertools.product(phases, (False, True)):
        run = job("lora", "kitti", 0, point, phase, validate=asked)
        assert run.settings.validate == (asked and phase == "tune")
        assert run.id == job("lora", "kitti", 0, point, phase).id
