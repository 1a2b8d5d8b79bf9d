"""The documents tell the truth: examples run, links lead somewhere, commands and options exist."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.paths import ROOT
from tests.test_repository import NOT_FOR_IMPORT

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
#: Examples that need an extra, and so a test of their own.
WITH_AN_EXTRA = ("own_environment",)
EXAMPLES = sorted(file for file in (ROOT / "examples").glob("*.py") if file.stem not in WITH_AN_EXTRA)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_on_the_core_package_alone(example: Path, tmp_path: Path) -> None:
    blocked = [name for name in NOT_FOR_IMPORT if name != "peft"]
    code = (
        "import sys, runpy, lightning.pytorch\n"
        f"for name in {blocked!r}: sys.modules.setdefault(name, None)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(example)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if example.stem == "quickstart":
        assert "7 / 7 / 10, sum 24" in done.stdout


def test_the_readme_shows_the_example_and_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("```python\n")[1].split("```")[0]
    assert (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").endswith(shown)
    assert len(text.splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]
    assert [link for link in links if not (document.parent / link).exists()] == []


def _named_options() -> dict[tuple[str, ...], set[str]]:
    """(Module, command) -> options that documents name in a line that calls it."""
    named: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        if document.name == "CHANGELOG.md":
            continue
        for line in re.findall(r"(?:^    |`)python -m ((?:experiments|benchmarks)[^`\n]*)", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            command = words[1:2] if len(words) > 1 and re.fullmatch("[a-z]+", words[1]) else []
            if words[0] == "experiments.vtab" and not command:
                command = ["run"] if "--task" in words else ["sweep"]
            named[(words[0], *command)] |= {word.split("=")[0] for word in words if word.startswith("--")}
    return named


@pytest.mark.parametrize("call", sorted(_named_options()), ids=" ".join)
def test_commands_and_options_exist(
    call: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*call, "--help-all"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(call[0], run_name="__main__", alter_sys=False)
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert [option for option in _named_options()[call] if not re.search(rf"{option}\b", printed)] == []


def test_the_citation_names_the_paper_and_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    paper = citation["references"][0]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Paischer",
        "Hauzenberger",
        "Schmied",
        "Alkin",
        "Deisenroth",
        "Hochreiter",
    ]


def test_pre_commit_runs_what_ci_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint:")[1].split("\n\n")[0]
    assert {hook["entry"].split()[0] for hook in hooks} == set(re.findall(r"\.venv/bin/(?:ruff|mypy)", lint))
