"""A page in a real headless Chromium: as wide as a phone, a tablet and a desk, in the dark, by keyboard, in print."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup

from eva_lightning import plots
from experiments.report import page
from experiments.report.epochs import compare
from experiments.report.learning_rates import Tuning, sensitivity_figure
from experiments.report.ranks import rank_figure
from tests.browser import CHROMIUM, Browser, browser, pages_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

WIDTHS = (360, 768, 1366)
TEMPLATE = """{% import "pieces.html" as pieces %}
<p>Words with averyverylongwordthatnobodyhasbrokenyet_and_goes_on_and_on_and_on_and_on/and/on/and/on.</p>
{{ pieces.facts({"Versions": "torch 2.0, " * 20, "File": "a/very/long/path/" * 12}) }}
<h3>Results</h3>{{ pieces.comparison(compared, "Tuned") }}
<h3>Ranks</h3>{{ pieces.figures([wide, tall]) }}
<h3>Wide</h3>{{ pieces.table(table) }}
{{ pieces.ending(tuning, "Part", "python -m experiments.demo --parts vision " * 5, "runs/" * 30) }}
"""

#: What stands out of the window and cannot be scrolled to by keyboard.
CUT = """[...document.querySelectorAll("body *")].filter(it =>
    it.getBoundingClientRect().right > innerWidth + 1 && it.getClientRects().length
    && !it.closest('[role="region"][tabindex="0"][aria-label]')).map(it => it.outerHTML.slice(0, 120))"""

#: The lowest contrast of a text with what is behind it, by WCAG 2's formula.
CONTRAST = """(() => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number)
    const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
    const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
    const behind = it => { const found = numbers(getComputedStyle(it).backgroundColor)
        return found[3] !== 0 ? found : it.parentElement ? behind(it.parentElement) : [255, 255, 255] }
    const texts = [...document.querySelectorAll("main *")].filter(it =>
        [...it.childNodes].some(child => child.nodeType === 3 && child.data.trim()) && it.getClientRects().length)
    return Math.min(...texts.map(it => { const pair = [light(numbers(getComputedStyle(it).color)), light(behind(it))]
        return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) }))
})()"""


def _body() -> Markup:
    draws = np.random.default_rng(0)
    rows = [
        {"method": method, "seed": seed, "lr": 1e-3, "trainable_parameters": 645_130, "setup_seconds": 1.0,
         "loss": list(draws.uniform(0.1, 2, 5)), "accuracy": list(draws.uniform(0, 1, 5))}
        for method in ("lora", "eva:1", "eva") for seed in (0, 1, 2)
    ]  # fmt: skip
    names = [f"model.blocks.{i}.{kind}" for i in range(12) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    ranks = dict(zip(names, draws.integers(1, 16, len(names)).tolist(), strict=True))
    scores = pd.DataFrame([{"method": m, "lr": lr, "loss": lr * 100} for m in ("lora", "eva") for lr in (1e-3, 1e-2)])
    cells = {f"A long heading {i}": ["0.1234 ± 0.0123\nmore below", "1"] for i in range(14)}
    table = page.Table("Wide", pd.DataFrame(cells, index=pd.Index(["first", "second"], name="Row")))
    tuning = Tuning(
        "LoRA 0.1", "the best", "2 seeds", "command", table, (), [sensitivity_figure(scores, "loss", "Loss")]
    )
    return Markup(
        page.TEMPLATES.from_string(TEMPLATE).render(
            compared=compare(pd.DataFrame(rows)),
            wide=rank_figure([ranks], 8, "Ranks"),
            tall=page.drawn(plots.rank_bars(ranks, 8), "Ranks of all layers"),
            table=table,
            tuning=tuning,
        )
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of piece but a film."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    data = page.runs_as_data("runs", "all runs", [{"seed": 0}])
    page.write_page(file, "A report", [page.Section("The first part", _body(), ("EVA is ahead.",), data)])
    return file


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_and_the_page_itself_does_not_scroll_sideways(shown: Browser, written: Path, width: int) -> None:
    shown.open(written, width)
    assert shown.value("innerWidth") == width
    assert shown.value("document.documentElement.scrollWidth") <= width
    assert shown.value(CUT) == []
    assert shown.value("[...document.images].every(it => it.complete && it.naturalWidth)")
    # letters of figures at two thirds of their size at least
    shrunk = (
        "Math.min(...[...document.querySelectorAll('figure img')].map(it => it.clientWidth / it.getAttribute('width')))"
    )
    assert shown.value(shrunk) > 0.6


def test_wide_tables_are_scrolled_by_keyboard_alone(shown: Browser, written: Path) -> None:
    shown.open(written, 360)
    wide = "document.activeElement.getAttribute('aria-label') === 'Wide'"
    for _ in range(60):
        shown.press("Tab", 9)
        if shown.value(wide):
            break
    assert shown.value(wide)
    assert shown.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert shown.value("document.activeElement.scrollLeft") == 0
    shown.press("ArrowRight", 39)
    moved = """new Promise(done => { const area = document.activeElement
        area.scrollLeft > 0 ? done(true) : area.addEventListener("scroll", () => done(area.scrollLeft > 0)) })"""
    assert shown.value(moved)
    # names of rows stay in sight
    assert shown.value("document.activeElement.querySelector('tbody th').getBoundingClientRect().left >= 0")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_and_figures_can_be_read_in_the_light_and_in_the_dark(shown: Browser, written: Path, dark: bool) -> None:
    shown.open(written, 1366, dark=dark)
    assert shown.value(CONTRAST) >= 4.5
    brightness = "getComputedStyle(document.querySelector('{}')).backgroundColor.match(/\\d+/g).map(Number)"
    assert (max(shown.value(brightness.format("main"))) < 60) == dark
    # figures are drawn in dark ink on nothing: a light card is behind them
    assert min(shown.value(brightness.format(".card"))) > 220


def test_headings_and_links_of_the_contents_lead_somewhere(shown: Browser, written: Path) -> None:
    shown.open(written, 1366)
    levels = shown.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(it => Number(it.tagName[1]))")
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert shown.value("document.querySelectorAll('main').length") == 1
    links = (
        "[...document.querySelectorAll('nav a')].map(it => document.querySelector(it.getAttribute('href'))?.innerText)"
    )
    assert shown.value(links) == ["The first part", "Results", "Ranks", "Wide", "Learning rates", "Repeat it", "Data"]
    top = "document.querySelector('.verdict').getBoundingClientRect().bottom"
    assert shown.value(top) < shown.value("document.querySelector('section').getBoundingClientRect().top")


def test_print_has_whole_tables_on_few_light_pages(shown: Browser, written: Path) -> None:
    shown.open(written, 703, dark=True)  # A4 without its margins
    shown.ask("Emulation.setEmulatedMedia", media="print", features=_dark())
    assert shown.value("document.documentElement.scrollWidth") <= 703
    right = "Math.max(...[...document.querySelectorAll('body *')].map(it => it.getBoundingClientRect().right))"
    assert shown.value(right) <= 704
    assert shown.value("getComputedStyle(document.body).color") == "rgb(32, 38, 43)"
    kept = "[...document.querySelectorAll('figure, table')].every(it => getComputedStyle(it).breakInside === 'avoid')"
    assert shown.value(kept)
    hidden = "['nav', '.data'].every(it => getComputedStyle(document.querySelector(it)).display === 'none')"
    assert shown.value(hidden)
    shown.ask("Emulation.setEmulatedMedia", media="", features=_dark())
    assert 2 <= pages_of(shown.pdf()) <= 4


def _dark() -> list[dict[str, Any]]:
    return [{"name": "prefers-color-scheme", "value": "dark"}]


#: Words of printed cells that stand on two lines, in tables that leave all of them room.
BROKEN = """[...document.querySelectorAll("th, td")].flatMap(cell => {
    const found = [], walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT)
    while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/[^\\s-]+/g)) {
        const range = document.createRange()
        range.setStart(walk.currentNode, word.index)
        range.setEnd(walk.currentNode, word.index + word[0].length)
        if (new Set([...range.getClientRects()].map(it => it.top)).size > 1) found.push(word[0])
    }
    return found })"""


def test_print_breaks_no_number_and_cuts_no_name(shown: Browser, tmp_path: Path) -> None:
    titles = ("lr", "Seeds", "Validation loss", "Success, any step", "Success, last step", "Return", "Trained",
              "Training (s)", "Validation loss minus LoRA")  # fmt: skip
    row = ("0.001", "3", "0.0294 ± 0.0038", "0.90 ± 0.43*", "0.83 ± 0.38*", "1459 ± 202*", "607,236", "8.8 ± 1.3",
           "-0.0038 ± 0.0057")  # fmt: skip
    usual = pd.DataFrame([row, row], index=pd.Index(["pre-trained", "FFT"], name="Method"), columns=list(titles))
    names = pd.DataFrame([["a_very_long_name_of_a_file_without_any_space.safetensors"] * 9], index=["row"])
    template = page.TEMPLATES.from_string('{% import "pieces.html" as pieces %}{{ pieces.table(it) }}')
    bodies = [Markup(template.render(it=page.Table(name, it))) for name, it in (("usual", usual), ("names", names))]
    file = tmp_path / "report.html"
    page.write_page(file, "In print", [page.Section(str(i), body) for i, body in enumerate(bodies)])
    shown.open(file, 703)
    shown.ask("Emulation.setEmulatedMedia", media="print", features=[])
    broken = shown.value(BROKEN)
    right = "Math.max(...[...document.querySelectorAll('table')].map(it => it.getBoundingClientRect().right))"
    assert shown.value(right) <= 704
    shown.ask("Emulation.setEmulatedMedia", media="", features=[])
    assert set(broken) == set(names.iloc[0])
