"""The paper's tables against themselves: what is typed into paper_tables.csv adds up to what the paper prints."""

from __future__ import annotations

import re
import shlex
import statistics
from pathlib import Path

import pytest
import yaml

from eva_lightning.methods import METHODS
from eva_lightning.vision.data.tasks import TASKS
from experiments.vtab import settings as run
from experiments.vtab import sweep_settings
from experiments.vtab.table_paper import GROUPS, HEADINGS, paper_lines, table25_methods
from tests.paths import ROOT

CONFIGS = sorted((ROOT / "configs/vtab").glob("dinov2_g14_*.yaml"))
TABLE_20 = ["fft", "lora", "adalora", "pissa", "olora", "eva", "dora", "eva-dora"]

#: A mean of entries rounded to 0.1 is off by at most 0.05, and so is what is printed of it.
WITHIN_ROUNDING = 0.1


def test_columns_are_the_19_tasks_in_the_printed_groups() -> None:
    assert set(HEADINGS) == set(TASKS)
    assert [len(GROUPS[group]) for group in ("natural", "specialized", "structured", "average")] == [7, 4, 8, 19]
    assert list(HEADINGS) == [task for group in ("natural", "specialized", "structured") for task in GROUPS[group]]


def test_lines_are_those_of_the_paper() -> None:
    assert [line.method for line in paper_lines().values() if line.samples] == TABLE_20
    assert table25_methods() == ["lora", "lora-redistribute", "eva-whiten", "eva-rotate", "eva-permute", "eva"]
    assert all(set(line.samples) in ({*HEADINGS}, set()) for line in paper_lines().values())
    eva, lora = paper_lines()["eva"], paper_lines()["lora"]
    assert (eva.samples["svhn"].mean, eva.samples["svhn"].std, eva.samples["svhn"].n) == (93.2, 0.3, 5)
    assert (lora.samples["svhn"].mean, lora.samples["svhn"].std) == (64.1, 36.4)
    assert (eva.averages[20], lora.averages[20]) == ({"average": 79.7}, {"average": 78.4})
    assert "rslora" not in paper_lines()


@pytest.mark.parametrize("method", TABLE_20)
def test_averages_of_tables_20_and_21_are_plain_means_over_the_tasks(method: str) -> None:
    line = paper_lines()[method]
    means = {task: sample.mean for task, sample in line.samples.items()}
    assert statistics.fmean(means.values()) == pytest.approx(line.averages[20]["average"], abs=WITHIN_ROUNDING)
    assert statistics.fmean(s.std for s in line.samples.values() if s.std is not None) == pytest.approx(
        line.averages[21]["average"], abs=WITHIN_ROUNDING
    )
    # not the mean of the three groups' means, as other works print it
    of_groups = statistics.fmean(
        statistics.fmean(means[task] for task in GROUPS[group]) for group in ("natural", "specialized", "structured")
    )
    assert 1.1 < of_groups - line.averages[20]["average"] < 2.6


def test_table_25_agrees_with_itself_and_with_table_20() -> None:
    for method in table25_methods():
        line = paper_lines()[method]
        weighted = sum(len(GROUPS[g]) * line.averages[25][g] for g in ("natural", "specialized", "structured")) / 19
        assert weighted == pytest.approx(line.averages[25]["average"], abs=WITHIN_ROUNDING)
        for group, value in line.averages[25].items():
            if line.samples:
                exact = statistics.fmean(line.samples[task].mean for task in GROUPS[group])
                assert value == pytest.approx(exact, abs=WITHIN_ROUNDING), (method, group)


def test_every_published_result_has_its_config() -> None:
    names = [f"dinov2_g14_{method.replace('-', '_')}" for method in TABLE_20]
    assert [file.stem for file in CONFIGS] == sorted(names)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_is_the_papers_protocol_and_its_numbers(file: Path) -> None:
    method = file.stem.removeprefix("dinov2_g14_").replace("_", "-")
    settings = run.parse(["--config", str(file), "--root", "x", "--task", "caltech101"])
    assert settings == run.Settings(root="x", task="caltech101", method=method)
    document = yaml.safe_load(file.read_text())
    assert ("rank" in document) == METHODS[method].adapts
    assert ("rho" in document) == METHODS[method].redistributes

    comment = " ".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    line = paper_lines()[method]
    printed = {task: (mean, std) for task, mean, std in re.findall(r"(\w+) (\d+\.\d) \((\d+\.\d)\)", comment)}
    assert printed == {task: (f"{s.mean:.1f}", f"{s.std:.1f}") for task, s in line.samples.items()}
    assert re.findall(r"average (\d+\.\d)", comment) == [f"{line.averages[20]['average']:.1f}"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_configs_commands_are_understood(file: Path) -> None:
    commands = [
        shlex.split(line)[4:] for line in file.read_text().splitlines() if line.startswith("#   python -m experiments")
    ]
    (_, *sweep), table, single = commands
    settings = sweep_settings.parse([*sweep])
    method = file.stem.removeprefix("dinov2_g14_").replace("_", "-")
    assert [each.name for each in settings.contenders] == [method]
    assert settings.model == "dinov2_g14"
    tuning, final = settings.search.sizes(METHODS[method].adapts, METHODS[method].searches_rho)
    comment = " ".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
    assert f"{19 * tuning:,} tuning runs and {19 * final} final ones" in comment
    assert table == ["table"]
    assert single == ["--config", f"configs/vtab/{file.name}", "--root", "DIR", "--task", "caltech101"]
