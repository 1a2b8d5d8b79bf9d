"""Pages are whole, accessible HTML, and what is put in them is text."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure as Drawing

from eva_lightning.rl.video import write_picture, write_video
from experiments.report import page
from experiments.report.learning_rates import Tuning


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def _section(context: str = "first") -> Markup:
    cells = pd.DataFrame({"a": ["1 *\n<b>"], "b": ["2"]}, index=pd.Index(["row"], name="head"))
    table = page.Table("What <it> shows", cells, ("± means this.",))
    figure = page.drawn(Drawing(), "What is seen", "Below")
    tuning = Tuning("LoRA 0.1", "the best", "2 seeds", "command", table, ["A sentence."], [figure])
    template = page.TEMPLATES.from_string(
        '{% import "pieces.html" as pieces %}{{ pieces.facts({"k": "<v>"}) }}<h3>A</h3>'
        "{{ pieces.tuning(tuning, context) }}"
    )
    return Markup(template.render(tuning=tuning, context=context))


def test_page_is_whole_and_accessible(tmp_path: Path) -> None:
    data = page.runs_as_data("runs", "two runs", [{"loss": [1.5, 0.5], "ranks": {"fc1": 4}, "seed": 0}, {"seed": 1}])
    sections = [page.Section("One & only", _section(), ("It works.",), data), page.Section("Two", _section("second"))]
    page.write_page(tmp_path / "deep" / "report.html", "A & B", sections)
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    tags = _Tags(text)
    assert tags.open == []
    assert len(tags.all("main")) == len(tags.all("h1")) == 1
    assert tags.all("html") == [{"lang": "en"}]
    assert len(tags.all("caption")) == len(tags.all("table")) == 2
    assert {attributes["scope"] for attributes in tags.all("th")} == {"col", "row"}
    assert all(attributes["alt"] for attributes in tags.all("img"))
    assert "<title>A &amp; B</title>" in text
    assert text.index("It works.") < text.index('<nav aria-label="Contents">') < text.index("What &lt;it&gt; shows")
    areas = [attributes for name, attributes in tags.seen if attributes.get("role") == "region"]
    assert all(area["tabindex"] == "0" for area in areas)
    assert len({area["aria-label"] for area in areas}) == len(areas) == 2
    names = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    links = [(link["href"] or "") for link in tags.all("a")]
    inside = {link[1:] for link in links if link.startswith("#")}
    assert len(set(names)) == len(names)
    assert inside == {"top", "data", "part-1", "part-1-1", "part-2", "part-2-1"} <= set(names)


def test_a_page_carries_the_numbers_behind_it() -> None:
    rows = [{"method": "eva", "loss": [1.5, 0.5], "ranks": {"fc1": 4}, "seed": 0}, {"method": "a,b", "seed": 1}]
    table, whole = page.runs_as_data("runs", "two runs", rows)
    assert (table.name, whole.name) == ("runs.csv", "runs.json")
    read = list(csv.DictReader(io.StringIO(base64.b64decode(table.source.partition(",")[2]).decode())))
    assert [row["method"] for row in read] == ["eva", "a,b"]
    assert json.loads(read[0]["loss"]) == [1.5, 0.5]
    assert "ranks" not in read[0]
    assert json.loads(base64.b64decode(whole.source.partition(",")[2])) == rows


def test_texts_are_escaped_and_the_best_cell_is_marked(tmp_path: Path) -> None:
    text = _section()
    assert "What &lt;it&gt; shows" in text
    assert "&lt;v&gt;" in text
    assert '<td class="best">1 *<br><small>&lt;b&gt;</small></td>' in text
    assert "<td>2</td>" in text


def _film(folder: Path) -> page.Film:
    """A film of 648 x 360 that begins black and ends in orange, as GIF and MP4."""
    frames = np.zeros((20, 360, 648, 3), np.uint8)
    frames[10:] = (240, 120, 20)
    gif, mp4 = (write_video([frames], folder / f"film{suffix}", stride=1) for suffix in (".gif", ".mp4"))
    return page.filmed(gif, mp4, write_picture(frames[-1], folder / "film.png"), "What is filmed", "Below")


def _film_section(film: page.Film) -> Markup:
    text = '{% import "pieces.html" as pieces %}<div class="film">{{ pieces.film(film) }}</div>'
    return Markup(page.TEMPLATES.from_string(text).render(film=film))


def test_a_film_has_controls_a_poster_and_a_gif_to_fall_back_to(tmp_path: Path) -> None:
    film = _film(tmp_path)
    tags = _Tags(_film_section(film))
    assert tags.open == []
    (video,) = tags.all("video")
    assert {"controls", "loop", "muted", "playsinline"} <= set(video)
    assert (video["poster"] or "").startswith("data:image/png;base64,")
    assert [source["type"] for source in tags.all("source")] == ["video/mp4"]
    fallback, printed = tags.all("img")
    assert (fallback["src"] or "").startswith("data:image/gif;base64,")
    assert (printed["src"], printed["class"]) == (video["poster"], "printed")
    without = _Tags(_film_section(page.filmed(tmp_path / "film.gif", None, None, "What is filmed")))
    assert not without.all("video")
    assert len(without.all("img")) == 1


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium here")
def test_a_browser_shows_the_film_and_can_play_it(tmp_path: Path) -> None:
    ask = """<script>addEventListener("load", () => { const film = document.querySelector("video"), body = document.body
    const note = () => body.dataset.film = `${film.readyState >= 2} ${film.videoWidth}x${film.videoHeight}`
    film.readyState >= 2 ? note() : film.addEventListener("loadeddata", note) })</script>"""
    file, picture = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_page(file, "Film", [page.Section("Film", _film_section(_film(tmp_path)) + Markup(ask))])
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,700",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000"]  # fmt: skip
    for what in ("--dump-dom", f"--screenshot={picture}"):
        done = subprocess.run([*chromium, what, file.as_uri()], capture_output=True, text=True, timeout=300, check=True)
        if what == "--dump-dom":
            assert 'data-film="true 648x360"' in done.stdout
    shown = iio.imread(picture)[..., :3].astype(int)
    orange = (abs(shown - (240, 120, 20)) < 25).all(axis=-1)
    columns = np.flatnonzero(orange.any(axis=0))
    # the poster, the film's end, in at least its own size; controls lie over its lower part
    assert columns[-1] - columns[0] + 1 >= 648
    assert orange.sum() > 0.5 * 648 * 360


def test_the_same_figure_is_the_same_bytes() -> None:
    assert page.drawn(Drawing(), "a") == page.drawn(Drawing(), "a")


def test_finished_runs_are_counted_by_the_time_they_were_written(tmp_path: Path) -> None:
    for name, moment in (("old", 100.0), ("new", 300.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text("{}")
        os.utime(tmp_path / name / "metrics.json", (moment, moment))
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    assert page.finished_when(folders, 200.0) == "2, 1 of them finished by an earlier call"
    assert page.finished_when(folders, 50.0) == "2, all computed now"


def test_lists_in_words() -> None:
    assert [page.enumerated(range(1, n)) for n in (2, 3, 4)] == ["1", "1 and 2", "1, 2 and 3"]
    assert [page.counted(n, "seed") for n in (1, 2)] == ["1 seed", "2 seeds"]
