"""The documents as tests read them: pages, fenced blocks, and the lines that call a command."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT
from tools.website.notes import BEFORE_A_BLOCK

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
"""Every page: those of the root and all under ``docs/``."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)
_FIRST = re.compile(r"<!-- run first:\n(.*?)-->", re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: Its page, from the root.
        language: ``python``, ``bash``, ``yaml``, or nothing for output.
        code: Without the indentation of the fence.
        line: Of its first line within the page, from 1.
        not_run: A key of :data:`tools.website.notes.NOT_RUN`, or None.
    """

    page: str
    language: str
    code: str
    line: int
    not_run: str | None = None


def name(page: Path) -> str:
    """A page, from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, and what it has run first (a comment that readers do not see), in order."""
    text = page.read_text(encoding="utf-8")
    found = [
        (hidden.start(), Block(name(page), "python", hidden[1], _line(text, hidden.start(1))))
        for hidden in _FIRST.finditer(text)
    ]
    for fence in _FENCE.finditer(text):
        reason = BEFORE_A_BLOCK.search(text, 0, fence.start())
        language = fence["info"].split(maxsplit=1)[0] if fence["info"].strip() else ""
        code = textwrap.dedent(fence["code"])
        block = Block(name(page), language, code, _line(text, fence.start("code")), reason[1] if reason else None)
        found.append((fence.start(), block))
    return [block for _, block in sorted(found, key=lambda pair: pair[0])]


def prose(page: Path) -> str:
    """A page without its fenced blocks; lines keep their numbers."""
    return _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), page.read_text(encoding="utf-8"))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def command_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every line that a reader would type: bash blocks, indented blocks, inline code."""
    for block in blocks(page):
        if block.language in ("bash", "sh", "console"):
            yield from _logical_lines(block.code, block.line)
    text = prose(page)
    for found in re.finditer(r"^(?:    |\t)(\S.*)$|`(python -m [^`]+|make [^`]+)`", text, re.M):
        line = " ".join((found[1] or found[2]).split())
        if re.match(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python|make|pip|eva-lightning|torchrun|srun|sbatch)\b", line):
            yield _line(text, found.start()), line


def _logical_lines(code: str, line: int) -> Iterator[tuple[int, str]]:
    joined, start = "", line
    for number, part in enumerate(code.splitlines(), line):
        start = start if joined else number
        if part.endswith("\\"):
            joined += part[:-1] + " "
            continue
        if (joined + part).strip() and not (joined + part).lstrip().startswith("#"):
            yield start, (joined + part).strip()
        joined = ""
