"""``--help`` fits on a screen and ``--help-all`` has everything, of every command."""

from __future__ import annotations

import importlib
import re
from dataclasses import MISSING, fields
from typing import Any

import pytest

from eva_lightning.initialization import INITS
from eva_lightning.ranks import METRICS
from experiments import demo
from experiments.runner import calling
from experiments.runner.command import SettingsCommand
from experiments.runner.help import help_text
from experiments.runner.settings import Role, flag, option
from experiments.runner.topics import COMMON, TOPICS, topic_of
from experiments.vtab import settings as vtab
from tests.experiments.runner.test_settings import settings_classes, settings_modules
from tests.paths import ROOT

COMMANDS = {
    value.prog: value
    for name in settings_modules()
    for value in vars(importlib.import_module(name)).values()
    if isinstance(value, SettingsCommand)
}


def _asked(
    prog: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int = 80
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        COMMANDS[prog].parse([word])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize("prog", sorted(COMMANDS))
def test_common_options_fit_on_one_screen(
    prog: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _asked(prog, "--help", monkeypatch, capsys)
    lines = text.split("\n")
    assert all(len(line) <= 80 for line in lines)
    many = len(fields(COMMANDS[prog].settings)) > 14
    # a terminal of 80 columns has 24 rows, one of which is for what is typed next
    assert not many or len(lines) <= 23
    required = [flag(item.name) for item in fields(COMMANDS[prog].settings) if item.default is MISSING]
    assert all(re.search(rf"{name}\b.*\(required\)", text) for name in required)
    assert {"--help-all", "--config"} <= set(re.findall(r"--[a-z-]+", text))


@pytest.mark.parametrize("prog", sorted(COMMANDS))
def test_all_options_stand_under_a_topic_with_their_choices_and_defaults(
    prog: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _asked(prog, "--help-all", monkeypatch, capsys)
    assert all(len(line) <= 80 for line in text.split("\n"))
    blocks = dict(re.findall(r"^  (--[a-z0-9-]+)(.*(?:\n      .*)*)", text, re.MULTILINE))
    for item in fields(COMMANDS[prog].settings):
        block = " ".join(blocks[flag(item.name)].split())
        assert item.metadata["help"] in block
        assert all(choice in block for choice in item.metadata["choices"] or ())
        if isinstance(item.default, str) and item.default:
            assert f"[{item.default}]" in block
        if isinstance(item.default, int | float) and item.default is not False:
            shown = block.partition("[")[2].partition("]")[0]
            assert shown == "true" if item.default is True else float(shown) == item.default
    heads = re.findall(r"^([a-z ]+):$", text, re.MULTILINE)
    assert heads == [topic for topic in TOPICS if topic in heads]
    assert len(heads) == len(set(heads)) >= 1


def test_what_a_wider_terminal_shows_is_cut_less(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prog = "python -m experiments.vtab run"
    narrow, wide = (_asked(prog, "--help", monkeypatch, capsys, columns) for columns in (80, 120))
    assert narrow.count(" ...") > wide.count(" ...")
    assert max(map(len, wide.split("\n"))) <= 120
    very = _asked(prog, "--help", monkeypatch, capsys, 20)
    assert max(map(len, very.split("\n"))) <= 60  # which a terminal wraps


def test_help_is_answered_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-h"], ["--task", "kitti", "--help"], ["--unknown", "--help-all"]):
        with pytest.raises(SystemExit):
            vtab.parse(words)
        assert capsys.readouterr().out.startswith("usage: python -m experiments.vtab run [options]\n")


@pytest.mark.parametrize("package", ["", ".vtab", ".metaworld"])
def test_groups_list_their_commands_in_eighty_columns(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main = importlib.import_module(f"experiments{package}.__main__").main
    texts = []
    for word in ("--help", "--help-all"):
        assert main([word]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    for text in texts:
        assert text.startswith("usage: ")
        assert len(text.splitlines()) <= 23
        assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize("package", ["vtab", "metaworld"])
def test_the_report_is_called_by_one_name(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"experiments.{package}.__main__").main(["report", "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m experiments.report RUN... [options]\n")


def test_every_option_has_a_topic() -> None:
    unlisted = {
        f"{kind.__module__}: {item.name}"
        for prog, kind in ((command.prog, command.settings) for command in COMMANDS.values())
        for item in fields(kind)
        if not item.metadata["topic"] and topic_of(item.name) == "other"
    }
    assert unlisted == set()


def test_the_demos_help_names_no_folder_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(["--help-all"])
    assert str(ROOT) not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("python -m experiments.vtab table", "eva-lightning vtab table"),
        ("python -m benchmarks metaworld", "eva-lightning metaworld benchmark"),
        ("python -m benchmarks costs", "python -m benchmarks costs"),  # a wheel has no way to it
    ],
    ids=["experiments", "benchmark", "checkout-only"],
)
def test_texts_of_a_wheel_name_what_can_be_called_there(
    text: str, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calling.as_called(text) == text
    monkeypatch.setattr(calling, "_IN_A_WHEEL", True)
    assert calling.as_called(text) == called
    item = option(None, f"as {text} has it", Role.RESULT)
    item.name = "an_option"
    assert called in help_text(text, text, {"--an-option": item}, {"--an-option": str}).replace("\n", " ")


def test_topics_name_options_that_exist_each_once() -> None:
    known = {item.name for kind in settings_classes().values() for item in fields(kind)}
    listed = [name for names in TOPICS.values() for name in names]
    assert len(listed) == len(set(listed))
    assert not set(listed) - known
    assert not COMMON - set(listed)


def test_a_default_that_is_long_is_cut_in_a_line_and_whole_in_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prog = "python -m experiments.vtab sweep"
    default: Any = next(item.default for item in fields(COMMANDS[prog].settings) if item.name == "methods")
    whole = f"[{','.join(default)}]"
    assert whole not in _asked(prog, "--help", monkeypatch, capsys)
    assert whole in " ".join(_asked(prog, "--help-all", monkeypatch, capsys, 120).split())


def test_choices_that_are_written_down_without_torch_are_those_of_the_library() -> None:
    assert vtab.INITS == INITS
    assert vtab.METRICS == METRICS
