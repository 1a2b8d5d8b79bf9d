"""The documentation site: it builds without a warning, loads nothing from outside, and its parts do what they say."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from tests.documents.pages import PAGES
from tests.paths import ROOT
from tools.website.docstrings import one_name_each, without_roles
from tools.website.equations import with_mathml
from tools.website.notes import with_reasons
from tools.website.sources import Sources, notebook_as_markdown


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. It is never skipped: what it needs is in requirements.lock."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


class _Loads(HTMLParser):
    """What a browser loads for a page, and where the page leads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.led_to: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag == "a" and found.get("href"):
            self.led_to.append(str(found["href"]))
        loads = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "video": "src"}
        if found.get(loads.get(tag, "")) and found.get("rel") != "canonical":
            self.loaded.append(str(found[loads[tag]]))


def _read(page: Path) -> _Loads:
    parser = _Loads()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


@pytest.mark.slow
def test_it_opens_from_a_folder_and_loads_nothing_from_outside(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        if page.name == "404.html":
            continue
        read = _read(page)
        for address in (*read.loaded, *read.led_to):
            if re.match(r"[a-z]+:", address):
                assert address in read.led_to, f"{page.name} loads {address}"
            elif not address.startswith("#"):
                target = page.parent / re.split("[?#]", address)[0]
                assert target.is_file(), f"{page.relative_to(site)} leads to {address}"
    for sheet in [*site.rglob("*.css"), *site.rglob("assets/*.js")]:
        assert not re.search(r"@import[^;]*https?:|url\(\s*['\"]?https?:", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.slow
def test_search_works_from_a_file(site: Path) -> None:
    script = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    found = json.loads(script.removeprefix("var __index = "))["docs"]
    assert {"how-to/qlora.html", "api/core.html", "method.html"} <= {doc["location"].split("#")[0] for doc in found}
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium; the index and the script are checked above")
def test_a_browser_finds_a_page_from_a_file(site: Path, tmp_path: Path) -> None:
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=15000",
    ]
    address = f"{(site / 'index.html').as_uri()}?q=qlora"
    shown = subprocess.run(["chromium", *options, "--dump-dom", address], capture_output=True, text=True).stdout
    assert re.search(r'<a href="[^"]*how-to/qlora\.html[^"]*" class="md-search-result__link"', shown)


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    docs = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
    assert sorted(nav) == sorted(docs)


@pytest.mark.slow
def test_the_api_reference_has_every_public_name(site: Path) -> None:
    ids = set().union(*(_read(page).ids for page in (site / "api").glob("*.html")))
    for package in ("eva_lightning", "eva_lightning.methods"):
        names = importlib.import_module(package).__all__
        assert [name for name in names if not any(each.endswith(f".{name}") for each in ids)] == []


@pytest.mark.slow
def test_no_role_is_left_in_the_reference(site: Path) -> None:
    assert [
        page for page in (site / "api").glob("*.html") if re.search(r":(?:class|func|mod):`", page.read_text())
    ] == []


@pytest.mark.slow
def test_equations_are_mathml(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') >= 7
    assert "arithmatex" not in page


@pytest.mark.parametrize("tex", ["\\frac{1}{", "\\nosuchcommand x"])
def test_an_equation_that_cannot_be_drawn_is_an_error(tex: str) -> None:
    with pytest.raises(ValueError, match="equation"):
        with_mathml(f'<div class="arithmatex">\\[{tex}\\]</div>')


def test_links_out_of_docs_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "a.py").write_text("x = 1\n")
    (tmp_path / "GUIDE.md").write_text("[page](docs/deep/page.md#there) and [code](examples/a.py)\n")
    page = (
        "[g](../../GUIDE.md) [a](../../examples/a.py) [none](../../missing.py) [web](https://example.org) [b](b.md)\n"
    )
    (tmp_path / "docs" / "deep" / "page.md").write_text(page)
    (tmp_path / "docs" / "deep" / "b.md").write_text("")
    sources = Sources(tmp_path)
    assert set(sources.pages()) == {"source/GUIDE.md", "source/examples/a.py.md"}
    assert "```python\nx = 1\n```" in sources.pages()["source/examples/a.py.md"]
    assert sources.relinked(page, "deep/page.md") == (
        "[g](../source/GUIDE.md) [a](../source/examples/a.py.md) [none](../../missing.py) [web](https://example.org) "
        "[b](b.md)\n"
    )
    assert sources.relinked((tmp_path / "GUIDE.md").read_text(), "source/GUIDE.md") == (
        "[page](../deep/page.md#there) and [code](examples/a.py.md)\n"
    )


@pytest.mark.slow
def test_the_site_says_which_blocks_no_test_runs(site: Path) -> None:
    assert with_reasons("<!-- not run: gpu -->\n") == "*Not run by the tests: needs CUDA GPUs.*\n"
    assert "Not run by the tests: needs CUDA GPUs" in (site / "how-to" / "many-devices.html").read_text()


def test_notebooks_become_pages() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# T\n", "text"]},
        {"cell_type": "code", "source": ["s = '```'"]},
    ]
    assert notebook_as_markdown(json.dumps({"cells": cells})) == "# T\ntext\n\n````python\ns = '```'\n````\n"


def test_docstrings_become_markdown_with_an_entry_for_each_name() -> None:
    assert without_roles("see :class:`~a.b.C` and :func:`a.f`::") == "see `C` and `a.f`:"
    text = "Does it.\n\nArgs:\n    a, b: Both\n        of them.\n    c: One, and: more.\n\nReturns:\n    x, y: A pair."
    assert one_name_each(text) == (
        "Does it.\n\nArgs:\n    a: Both\n        of them.\n    b: Both\n        of them.\n    c: One, and: more.\n\n"
        "Returns:\n    x, y: A pair."
    )


def test_the_make_target_builds_what_the_test_builds() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "mkdocs build --strict" in makefile.split("\ndocs:")[1].split("\n\n")[0]
    assert "strict: true" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["theme"]["font"] is False
