from __future__ import annotations

import pytest

from benchmarks.metaworld import collect, command_line, data


def test_collecting_is_timed_against_a_bare_loop() -> None:
    figures = collect.measure(tasks=("reach",), episodes=2, repeats=1, horizon=10, workers=2)
    assert set(figures) == {
        "collect_ratio",
        "collect_ratio_strict",
        "collect_steps_per_second",
        "collect_raw_steps_per_second",
        "collect_ratio_workers",
        "collect_workers",
    }
    assert figures["collect_ratio"].target == figures["collect_ratio_workers"].target == ">= 0.9"
    assert all(figure.median > 0 for figure in figures.values())
    assert figures["collect_ratio_strict"].median < figures["collect_ratio"].median


def test_steps_are_timed_with_and_without_the_pipeline() -> None:
    figures = data.measure(steps=3, batch_size=4)
    assert figures["ratio"].target == "<= 1.03"
    assert all(len(figure.values) == 3 and figure.median > 0 for figure in figures.values())


def test_mistyped_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["--parts", "colect"]) == 2
    assert capsys.readouterr().err == "error: --parts: unknown part 'colect': did you mean collect?\n"
