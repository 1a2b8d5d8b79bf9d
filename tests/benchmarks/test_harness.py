from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.harness import BenchmarkSettings, CannotRunError, Figure, Figures, in_turn, measure_parts


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = [low <= 1 <= high for low, high in (Figure.of(rng.lognormal(size=9)).interval for _ in range(2000))]
    assert 0.95 <= np.mean(covered) < 0.98
    assert Figure.of([3, 1, 2]).interval == (1, 3)
    assert Figure.of(range(9)).interval == (1, 7)


def test_ratios_are_of_pairs() -> None:
    figure = Figure.ratio([1, 4, 9], [1, 2, 3], "<= 1")
    assert figure.values == (1, 2, 3)
    assert figure.text() == "2.000 (1.000-3.000)"
    assert Figure.of([1234.5]).text() == "1,234"


def test_everything_runs_in_turn() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert in_turn({"a": lambda: run("a"), "b": lambda: run("b")}, 2, warm_up=1) == {"a": [3, 5], "b": [4, 6]}
    assert order == ["a", "b"] * 3


def unavailable() -> Figures:
    raise CannotRunError("it needs a CUDA GPU")


def test_one_table_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "speed.json"
    parts = {"data": lambda: {"speed": Figure.of([1234.5], "<= 1.03")}, "gpu": unavailable}
    assert measure_parts(parts, BenchmarkSettings(json=str(file))) == {"data": {"speed": Figure((1234.5,), "<= 1.03")}}
    text = capsys.readouterr().out
    for expected in ("<= 1.03", "1,234", "gpu: not run, it needs a CUDA GPU", "load average"):
        assert expected in text
    written = json.loads(file.read_text())
    assert written["figures"]["data"]["speed"]["median"] == 1234.5
    assert written["not_run"] == {"gpu": "it needs a CUDA GPU"}
    assert written["machine"]["cores"] >= 1
    assert {"processor", "threads", "load_average", "load_average_after", "versions"} <= set(written["machine"])


def test_json_on_standard_output_is_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    measure_parts({"data": lambda: {"speed": Figure.of([2])}}, BenchmarkSettings(json="-"))
    assert json.loads(capsys.readouterr().out)["figures"]["data"]["speed"]["values"] == [2]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_has_a_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--repaets=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown option '--repaets'")
    assert error.count("\n") == 1
