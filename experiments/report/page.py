"""A self-contained HTML page: images and style sheet are embedded, so the file can be moved or mailed."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
import platform
from collections.abc import Iterable, Sequence
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

from eva_lightning.files import write_text

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
            details; a cell that has an asterisk is marked as the best of its kind.
        notes: Sentences below it: units, what ± and * mean.
    """

    caption: str
    cells: pd.DataFrame
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """An image for the page.

    Attributes:
        source: Its ``data:`` URI.
        alt: What it shows, for who does not see it.
        caption: What stands below it.
    """

    source: str
    alt: str
    caption: str = ""


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


def drawn(figure: matplotlib.figure.Figure, alt: str, caption: str = "") -> Figure:
    """A matplotlib figure as SVG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "eva_lightning"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Figure(_data_uri("image/svg+xml", buffer.getvalue()), alt, caption)


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
    """A section of a page, by the template called `template`."""
    return Markup(TEMPLATES.get_template(template).render(content))


def write_page(path: Path, title: str, sections: Sequence[Markup]) -> None:
    """Write the page that holds `sections` to `path`, all or nothing."""
    write_text(path, TEMPLATES.get_template("page.html").render(title=title, sections=sections))


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
