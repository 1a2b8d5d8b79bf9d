"""The documents tell the truth: links lead somewhere, the README shows the example; the rest is in tests/documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.documents.pages import PAGES, name, prose
from tests.paths import ROOT


def test_the_readme_shows_the_example_and_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text.split("```python\n")[1].split("```")[0]
    assert (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").endswith(shown)
    assert len(text.splitlines()) <= 200


@pytest.mark.parametrize("document", PAGES, ids=name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    text = prose(document)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", PAGES, ids=name)
def test_tables_say_what_their_columns_are(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert re.findall(r"^[| ]+\n\|(?: ?:?-+:? ?\|)+$", text, re.MULTILINE) == []


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
