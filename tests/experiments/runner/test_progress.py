from __future__ import annotations

import pytest

from experiments.runner import progress as module
from experiments.runner.progress import Progress, span


def test_durations() -> None:
    assert [span(s) for s in (0, 45, 89, 720, 5399, 12600, 518400, 3.2e10)] == [
        "0 s", "45 s", "89 s", "12 min", "90 min", "3.5 h", "6 days", "1,014 years",
    ]  # fmt: skip


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Progress("fake", 1, 4, live=False) as progress:
        progress.finished("first")
        assert capsys.readouterr().out == ""  # too soon for a line
        monkeypatch.setattr(module, "EVERY_SECONDS", 0.0)
        progress.finished("second", total=5)
        assert capsys.readouterr().out == "[3/5] second; …\n"
        monkeypatch.setattr(module, "EVERY_SECONDS", 1000.0)
        progress.finished("third")
        progress.finished("fourth")  # the last one is always said
        assert capsys.readouterr().out == "[5/5] fourth; 0 s in all\n"


def test_nothing_where_it_is_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("fake", 0, 1, show=False) as progress:
        progress.finished("only")
    assert capsys.readouterr().out == ""


def test_a_live_display_shows_the_last_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("fake", 0, 9, live=True) as progress:
        for number in range(8):
            progress.finished(f"run {number}")
        lines = [str(part) for part in [*progress._bar.get_renderables()][1:]]
    assert lines == [f"  run {number}" for number in range(3, 8)]
