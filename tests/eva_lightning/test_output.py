"""What is said while EVA works: through logging, as a table, a line, or not at all."""

from __future__ import annotations

import builtins
import importlib.util
import io
import logging
import re
import runpy
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

import eva_lightning
from eva_lightning import EVAInitCallback, output
from eva_lightning.errors import EVAWarning, InputError
from eva_lightning.output import can_animate, say, show
from eva_lightning.summary import progress_bar
from experiments.runner.run_log import logging_to
from tests.modules import build, loader, mlp, trainer
from tests.paths import ROOT

ROWS = [("layers", "3, of which 0 removed"), ("left as is", "[1/2] of them")]
LINE = "EVA initialisation: layers: 3, of which 0 removed; left as is: [1/2] of them"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has not set up logging: pytest itself listens, and would be taken for one that has."""
    monkeypatch.setattr(output._SCREEN, "filters", [])
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def terminal(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.usefixtures("alone")
def test_without_a_terminal_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("EVA: 3 layers")
    show("EVA initialisation", ROWS)
    assert capsys.readouterr().out == f"EVA: 3 layers\n{LINE}\n"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_one_table_with_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    show("EVA initialisation", ROWS)
    shown = plain(capsys.readouterr().out)
    assert shown.count("EVA initialisation") == 1
    assert "┌" in shown
    assert LINE not in shown
    for row in ROWS:
        assert re.search(r"│\s+".join(re.escape(cell) + r"\s+" for cell in row), shown)


@pytest.mark.parametrize("where", ["", "eva_lightning"], ids=["at the root", "at ours"])
def test_a_program_that_has_set_up_logging_gets_records_and_the_screen_none(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[str] = []

    class Own(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(f"{record.levelname} {record.name}: {record.getMessage()}")

    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.getLogger("eva_lightning"), "handlers", [output._SCREEN])
    show("EVA initialisation", ROWS)
    assert capsys.readouterr().out == f"{LINE}\n", "nobody has"
    logging.getLogger(where).addHandler(Own())
    show("EVA initialisation", ROWS)
    assert records == [f"INFO eva_lightning: {LINE}"]
    assert capsys.readouterr().out == ""


class ForErrors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage())


@pytest.mark.parametrize("handler", [ForErrors, logging.NullHandler])
def test_a_handler_that_takes_no_such_record_does_not_hide_it(
    handler: type[logging.Handler], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [handler()])
    monkeypatch.setattr(logging.getLogger("eva_lightning"), "handlers", [output._SCREEN])
    say("EVA: 3 layers")
    assert capsys.readouterr().out == "EVA: 3 layers\n"


@pytest.mark.usefixtures("terminal")
def test_an_output_in_ascii_gets_the_line_without_what_it_has_no_characters_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert not can_animate()
    show("EVA initialisation", [("capped", "größe")])
    sys.stdout.flush()
    assert written.getvalue() == b"EVA initialisation: capped: gr\\xf6\\xdfe\n"


@pytest.mark.usefixtures("terminal")
def test_a_narrow_terminal_shows_all_of_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    name = "model.decoder.layers.11.self_attn.q_proj"
    show("EVA initialisation", [("ranks min/median/max", name)])
    shown = plain(capsys.readouterr().out)
    assert max(map(len, shown.splitlines())) <= 30
    columns = [line.split("│")[1:3] for line in shown.splitlines() if "│" in line]
    first, second = ("".join(cell.strip() for cell in column) for column in zip(*columns, strict=True))
    assert (first.replace(" ", ""), second) == ("ranksmin/median/max", name)


@pytest.mark.usefixtures("terminal")
def test_a_level_silences_the_bar(caplog: pytest.LogCaptureFixture) -> None:
    assert can_animate()
    with caplog.at_level(logging.WARNING, logger="eva_lightning"):
        assert not can_animate()


@pytest.mark.usefixtures("alone")
def test_a_level_silences(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="eva_lightning"):
        say("EVA: 3 layers")
        logging.getLogger("eva_lightning.sealed").warning("damaged")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "warning: damaged\n"


@pytest.mark.usefixtures("alone")
def test_only_the_first_process_speaks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "is_first", lambda: False)
    say("EVA: 3 layers")
    show("EVA initialisation", ROWS)
    assert capsys.readouterr().out == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # stops at the limit, which the first process warns of
        eva_lightning.initialize(mlp(), loader(), r=4, algorithm="paper", max_batches=2)
    monkeypatch.undo()
    with pytest.warns(EVAWarning, match="the most allowed"):
        eva_lightning.initialize(mlp(), loader(), r=4, verbose=False, algorithm="paper", max_batches=2)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("verbose", "bar", "lines"),
    [(True, False, 2), ("auto", False, 0), ("auto", True, 2), (False, True, 0)],
    ids=["always", "auto without a bar", "auto with a bar", "never"],
)
def test_silent_without_progress_bars_when_asked(
    verbose: Any, bar: bool, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = EVAInitCallback(r=4, verbose=verbose)
    trainer(callback, enable_progress_bar=bar, max_epochs=0).fit(build(), loader())
    out = plain(capsys.readouterr().out)
    assert len(re.findall("^EVA", out, re.MULTILINE)) == lines


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="verbose must be True, False or 'auto', got 'quiet'"):
        EVAInitCallback(verbose="quiet")  # type: ignore[arg-type]


def test_a_runs_log_has_what_the_screen_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path / "log.txt"):
        trainer(EVAInitCallback(r=4), max_epochs=0).fit(build(), loader())
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("EVA")]
    logged = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert len(shown) == 2
    assert [line.partition(" eva_lightning: ")[2] for line in logged if " eva_lightning: " in line] == shown
    assert "ranks min/median/max: " in shown[1]


@pytest.mark.usefixtures("terminal")
def test_the_readme_shows_what_its_example_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    printed = [line.rstrip() for line in re.split("[\r\n]", plain(capsys.readouterr().out))]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.split("before the first training step[^\n]*:\n\n```\n", readme)[1].partition("```")[0]
    # seconds differ from machine to machine
    expected = [line for line in block.splitlines() if line and "seconds" not in line]
    assert len(expected) == 9
    assert [line for line in printed if line in expected] == expected


class ZMQInteractiveShell:
    """What rich takes a notebook's shell for, by its name."""


@pytest.fixture
def notebook(alone: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As in a notebook, whose output is what IPython's ``display`` is given."""
    displayed: list[Any] = []
    module = types.ModuleType("IPython.display")
    module.display = displayed.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    return displayed


def test_a_notebook_shows_the_table(notebook: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    show("EVA initialisation", ROWS)
    (shown,) = notebook
    bundle = shown._repr_mimebundle_([], [])
    assert "┌" in bundle["text/plain"]
    assert "3, of which 0 removed" in bundle["text/html"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_without_widgets_has_no_bar_and_no_warnings(
    notebook: list[Any], widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if widgets else None)
    assert can_animate() == widgets
    if not widgets:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with progress_bar(True, "streaming", 2) as (bar, task):
                bar.advance(task)
    assert notebook == []


@pytest.mark.usefixtures("alone")
def test_a_bar_needs_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(True, "streaming", 2) as (bar, task):
        bar.advance(task)
    assert capsys.readouterr().out == ""
