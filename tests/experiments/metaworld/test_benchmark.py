from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.metaworld import benchmark, benchmark_collect


def test_collecting_is_timed_against_a_bare_loop() -> None:
    figures = benchmark_collect.measure(tasks=("reach",), episodes=2, repeats=1, horizon=10, workers=2)
    assert set(figures) == {
        "collect_ratio",
        "collect_ratio_strict",
        "collect_steps_per_second",
        "collect_raw_steps_per_second",
        "collect_ratio_workers",
        "collect_workers",
    }
    assert set(benchmark_collect.TARGETS) <= set(figures)
    assert all(value > 0 for value in figures.values())
    assert figures["collect_ratio_strict"] < figures["collect_ratio"]


def test_one_table_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def module(part: str) -> Any:
        targets = {"rollout": {"speed": 0.3}, "data": {"speed": "<= 1.03"}}.get(part, {})
        return SimpleNamespace(measure=lambda: {"speed" if part != "collect" else "steps": 1234.5}, TARGETS=targets)

    monkeypatch.setattr(benchmark, "_module", module)
    results = benchmark.main(["--parts", "collect,data", "--json", str(tmp_path / "new" / "speed.json")])
    assert results == {"collect": {"steps": 1234.5}, "data": {"speed": 1234.5}}
    text = capsys.readouterr().out
    assert "<= 1.03" in text
    assert "1,234" in text
    written = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert written["figures"] == results
    assert written["machine"]["cores"] >= 1


def test_mistyped_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.command_line(["--parts", "colect"]) == 2
    assert capsys.readouterr().err == "error: unknown part 'colect': did you mean collect?\n"
