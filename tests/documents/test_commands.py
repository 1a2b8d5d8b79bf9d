"""Every command line of every page is one that its own parser takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.runner.settings import parse_settings
from tests.documents.pages import PAGES, blocks, command_lines, name
from tests.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Commands of others, which are not looked into.
FOREIGN = (
    "apt-get",
    "cd",
    "docker",
    "export",
    "git",
    "hatchling",
    "hf",
    "minari",
    "ray",
    "sbatch",
    "source",
    "sudo",
    "uv",
)
#: Scripts that pages call and readers write.
OWN_SCRIPTS = ("train.py", "my_script.py")
#: What starts another command, and how many of its words go before that one.
LAUNCHERS = ("torchrun", "srun", "accelerate", "nohup", "nice", "time")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS, SCRIPTS = set(PROJECT["optional-dependencies"]), set(PROJECT.get("scripts", ()))

#: Folders of images that pages call by name, in the folder that they call DIR.
READERS_FOLDERS = ("dtd10", "ucmerced_landuse", "eth80_azimuth", "cifar10", "gtsrb32", "my_folder")

LINES = {page: list(command_lines(page)) for page in PAGES}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's data that commands look for before they start; the checkout is the working folder."""
    for folder in READERS_FOLDERS:
        for label in ("train/one", "train/two", "test/one", "test/two"):
            for image in range(3):
                path = tmp_path / folder / label / f"{image}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    monkeypatch.chdir(ROOT)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if LINES[page] and page.name != "CHANGELOG.md"], ids=name)
def test_commands_and_options_exist(page: Path, data: Path) -> None:
    refused = []
    for number, line in LINES[page]:
        try:
            words = shlex.split(line, comments=True)
            check([str(data) if word == "DIR" else word for word in words])
        except (Exception, SystemExit) as error:
            refused.append(f"{name(page)}:{number}: {line}: {type(error).__name__}: {error}")
    assert refused == []


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language == "bash" for b in blocks(p))], ids=name)
def test_bash_blocks_are_bash(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.page}:{block.line}: {done.stderr}"


def test_the_check_refuses_what_does_not_exist() -> None:
    for line in (
        "make nothing", "pip install '.[nothing]'", "python -m experiments.vtab --taks x", "python examples/no.py",
        "python -m eva_lightning.precompute train:build --outputs eva", "python -m nothing", "ls",
        "python -m experiments.metaworld finetune --task no-such-task", "python -m experiments.vtab sweep --lrs fast",
        "python -m benchmarks speed", "eva-lightning nothing", "make demo NOTHING=1",
        "torchrun --nproc-per-node 2 nothing.py",
    ):  # fmt: skip
        with pytest.raises((Exception, SystemExit)):
            check(shlex.split(line))


def check(words: Sequence[str]) -> None:
    """Parse a command line as the command would, and do nothing else.

    Raises:
        Exception, SystemExit: It is refused, or nothing is known of it.
    """
    words = [word for word in words if word != "\\"]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, rest = words[0].removeprefix(".venv/bin/"), list(words[1:])
    if program in FOREIGN:
        return
    if program in LAUNCHERS:
        check(_launched(rest))
    elif program == "make":
        _check_make(rest)
    elif program == "pip":
        _check_pip(rest)
    elif program == "eva-lightning":  # in a checkout the same as python -m experiments.NAME
        assert program in SCRIPTS, f"no script {program}"
        if not rest[0].startswith("-"):
            _check_module(f"experiments.{rest[0]}", rest[1:])
    elif program in ("python", "python3") and rest[:1] == ["-m"]:
        _check_module(rest[1], rest[2:])
    elif program in ("python", "python3"):
        assert rest[0] in OWN_SCRIPTS or (ROOT / rest[0]).is_file(), f"no script {rest[0]}"
    else:
        raise AssertionError(f"nothing is known of {program}")


def _launched(words: list[str]) -> list[str]:
    """What a launcher starts: from the first word that is Python, a script or a module's name on."""
    for position, word in enumerate(words):
        if word in ("python", "python3"):
            return words[position:]
        if word.endswith(".py"):
            return ["python", *words[position:]]
        if word in ("-m", "--module"):
            return ["python", "-m", *words[position + 1 :]]
    raise AssertionError(f"it starts nothing: {words}")


def _check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    # make hands variables of its command line on to what it calls
    script = (ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8")
    variables = {*re.findall(r"^([A-Z_]+) \?=", makefile, re.M), *re.findall(r"\$\{([A-Z_]+):-", script)}
    for word in words:
        variable, equals, _ = word.partition("=")
        assert variable in (variables if equals else targets), f"the Makefile has no {variable}"


def _check_pip(words: list[str]) -> None:
    assert words[0] in ("install", "download"), words
    for extras in re.findall(r"(?:^\.|^eva[-_]lightning)\[([^\]]*)\]", "\n".join(words), re.M):
        assert set(extras.split(",")) <= EXTRAS, f"no extra {extras}"


def _check_module(module: str, words: list[str]) -> None:
    words = [word for word in words if word != "..."]
    if module == "pytest":
        assert all((ROOT / word.split("::")[0]).exists() for word in words if word.startswith("tests/"))
        return
    if not {"--help", "--help-all"}.isdisjoint(words):
        words = []
    if module in ("experiments.analysis", "experiments.metaworld", "experiments.vtab", "benchmarks"):
        _check_command(importlib.import_module(f"{module}.__main__"), words)
        return
    parse = _parse(module)
    if words:  # a name alone is only looked up
        parse(words)


def _check_command(package: Any, words: list[str]) -> None:
    """A command of a package with several: by its name or by what the line implies. A name alone is only looked up."""
    if not words or words[0] in ("NAME", "COMMAND"):
        return
    implied = getattr(package, "_implied", lambda words: "all")
    command = implied(words) if words[0].startswith("-") else words.pop(0)
    module = package.COMMANDS[command].module
    if words:
        _parse(module)(words)


def _parse(module: str) -> Callable[[list[str]], Any]:
    """What parses the command line of a module and does nothing else."""
    found = importlib.import_module(module)
    if module.startswith("eva_lightning."):
        return _argparse(found)
    if hasattr(found, "parse"):
        return found.parse
    if hasattr(found, "COMMAND"):
        return found.COMMAND.parse
    settings = found.Settings if hasattr(found, "Settings") else importlib.import_module(f"{module}.settings").Settings
    return lambda words: parse_settings(settings, module, "", words)


def _argparse(module: Any) -> Callable[[list[str]], Any]:
    """What a module with an argument parser does with a line, stopped once that has read it."""
    run = module.main if hasattr(module, "main") else module.command_line

    class Read(Exception):
        pass

    def parse(words: list[str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            read = argparse.ArgumentParser.parse_args

            def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
                read(self, args, namespace)
                raise Read

            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            with pytest.raises(Read):
                run(words)

    return parse
