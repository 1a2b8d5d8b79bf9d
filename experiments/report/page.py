"""A self-contained HTML page: images and style sheet are embedded, so the file can be moved or mailed."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from eva_lightning.files import as_json, write_text

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Table:
    """A table for the page and for the terminal.

    Attributes:
        caption: What it shows.
        cells: Texts. The index holds the headers of rows, its name the header above them. Further lines of a cell are
            details; a cell whose first line ends in an asterisk is marked as the best of its kind.
        notes: Sentences below it: units, what ± and * mean.
    """

    caption: str
    cells: pd.DataFrame
    notes: tuple[str, ...] = ()

    @property
    def has_many_columns(self) -> bool:
        """Whether it takes small letters for all of it to stand on a sheet of paper."""
        return len(self.cells.columns) > _MANY_COLUMNS

    def is_loose(self, text: str) -> bool:
        """Whether a word of a cell is too long for its share of a sheet of paper, where it has to break."""
        room = (_SMALL_LETTERS if self.has_many_columns else _LETTERS) // (1 + len(self.cells.columns))
        return max(map(len, re.split(r"[\s-]+", text))) > room


@dataclass(frozen=True)
class Figure:
    """An image for the page.

    Attributes:
        source: Its ``data:`` URI.
        alt: What it shows and what follows from it, for who does not see it.
        caption: What stands below it.
        width, height: Its natural size in CSS pixels; 0 where that does not matter.
    """

    source: str
    alt: str
    caption: str = ""
    width: int = 0
    height: int = 0

    @property
    def is_wide(self) -> bool:
        """Whether it takes a row of its own, and is scrolled where that is too narrow to read it."""
        return self.width > _WIDE

    @property
    def is_tall(self) -> bool:
        """Whether two others stand one above the other beside it."""
        return self.height > _WIDE

    @property
    def short(self) -> str:
        """The beginning of its text, as the name of the area in which it is scrolled."""
        return re.split(r"[:;,.]", self.alt)[0]


@dataclass(frozen=True)
class Film:
    """A video for the page: with controls where there is an MP4, else the GIF that it falls back to.

    Attributes:
        figure: The GIF.
        source: ``data:`` URI of the MP4; empty where there is none.
        poster: That of the picture that is shown before it plays.
    """

    figure: Figure
    source: str = ""
    poster: str = ""


@dataclass(frozen=True)
class Data:
    """A file that a page carries, to be saved by a click.

    Attributes:
        name: What it is saved as.
        what: What is in it.
        source: Its ``data:`` URI.
    """

    name: str
    what: str
    source: str


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading.
        body: What stands below: headings in it are ``<h3>`` and ``<h4>``, without attributes.
        verdict: What came out, in sentences: they stand at the top of the page.
        data: The numbers behind it.
    """

    title: str
    body: Markup
    verdict: tuple[str, ...] = ()
    data: tuple[Data, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A line of the contents, with those below it."""

    anchor: str
    text: Markup
    below: tuple[_Entry, ...] = ()


#: More pixels than this, and a figure takes a row of its own, or the height of two.
_WIDE = 640
#: More columns than this, and a table is printed in small letters.
_MANY_COLUMNS = 8
#: Letters of a printed row without its margins, and of one of small letters.
_LETTERS, _SMALL_LETTERS = 100, 130
#: Numbers of the longest list in a cell of a CSV file.
_LONGEST_CELL = 100
_HEADING = re.compile(r"<h3>(.*?)</h3>", re.DOTALL)


def drawn(figure: matplotlib.figure.Figure, alt: str, caption: str = "") -> Figure:
    """A matplotlib figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "eva_lightning"}):
        # the page's style sheet gives it a background
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Figure(_data_uri("image/svg+xml", buffer.getvalue()), alt, caption, width, height)


def embedded(file: Path, alt: str, caption: str = "") -> Figure:
    """A GIF file."""
    return Figure(_data_uri("image/gif", file.read_bytes()), alt, caption)


def filmed(gif: Path, mp4: Path | None, poster: Path | None, alt: str, caption: str = "") -> Film:
    """A GIF file, and where there is one the same as MP4, with a PNG that is shown before it plays."""
    figure = embedded(gif, alt, caption)
    if mp4 is None or poster is None:
        return Film(figure)
    return Film(figure, _data_uri("video/mp4", mp4.read_bytes()), _data_uri("image/png", poster.read_bytes()))


def photograph(file: Path, alt: str, caption: str = "") -> Figure:
    """A JPEG or PNG file as it is."""
    kind = "image/png" if file.suffix.lower() == ".png" else "image/jpeg"
    return Figure(_data_uri(kind, file.read_bytes()), alt, caption)


def thumbnail(pixels: np.ndarray, alt: str, caption: str = "") -> Figure:
    """Pixels ``(3, H, W)`` uint8 as a small JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format="JPEG", quality=85)
    return Figure(_data_uri("image/jpeg", buffer.getvalue()), alt, caption)


def render(template: str, **content: Any) -> Markup:
    """The body of a section, by the template called `template`."""
    return Markup(TEMPLATES.get_template(template).render(content))


def runs_as_data(name: str, what: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Data, Data]:
    """Rows of runs, as plain JSON values: a CSV file of values and short lists, a JSON file of everything."""
    flat = [{key: _in_a_cell(value) for key, value in row.items() if not _is_nested(value)} for row in rows]
    table = pd.DataFrame(flat).to_csv(index=False)
    whole = as_json(list(rows), indent=1)
    uri = _data_uri("application/json", whole.encode())
    return (
        Data(f"{name}.csv", f"{what}, a row each", _data_uri("text/csv", table.encode())),
        Data(f"{name}.json", f"{what}, with everything that was measured", uri),
    )


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page to `path`, all or nothing: verdicts first, then contents, the sections and their data."""
    bodies, contents = [], []
    for place, section in enumerate(sections, 1):
        body, below = _with_anchors(section.body, f"part-{place}")
        bodies.append(body)
        contents.append(_Entry(f"part-{place}", Markup.escape(section.title), tuple(below)))
    template = TEMPLATES.get_template("page.html")
    write_text(path, template.render(title=title, sections=sections, bodies=bodies, contents=contents))


def _with_anchors(body: Markup, prefix: str) -> tuple[Markup, list[_Entry]]:
    """The body with a name on every heading, and the entries of the contents that lead there."""
    found: list[_Entry] = []

    def named(match: re.Match[str]) -> str:
        entry = _Entry(f"{prefix}-{len(found) + 1}", Markup(match[1]))
        found.append(entry)
        return f'<h3 id="{entry.anchor}">{match[1]}</h3>'

    return Markup(_HEADING.sub(named, body)), found


def _is_nested(value: Any) -> bool:
    """Whether a value is for no cell of a table: a mapping, or a list that is long or has other than numbers in it."""
    if isinstance(value, list):
        return len(value) > _LONGEST_CELL or not all(isinstance(item, int | float) for item in value)
    return isinstance(value, Mapping)


def _in_a_cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def machine() -> str:
    """Processor, cores, system and Python in one phrase."""
    return f"{_processor()}, {os.cpu_count()} logical cores, {platform.system()}, Python {platform.python_version()}"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of libraries, by their names."""
    return {name: importlib.metadata.version(name) for name in packages}


def finished_when(folders: Iterable[str], started: float) -> str:
    """How many of the runs in `folders` were finished by an earlier call, before the time `started`, in words."""
    written = [(Path(folder) / "metrics.json").stat().st_mtime for folder in folders]
    earlier = sum(moment < started for moment in written)
    return f"{len(written)}, " + (f"{earlier} of them finished by an earlier call" if earlier else "all computed now")


def enumerated(items: Sequence[Any]) -> str:
    """``1``, ``1 and 2``, ``1, 2 and 3``."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
