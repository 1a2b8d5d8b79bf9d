"""MkDocs' hooks (``mkdocs.yml`` names this file): links out of ``docs/``, and equations as MathML.

The pages under ``docs/`` read the same on the site and in the repository, where links lead to examples, configurations
and other files too. Those become pages of the site: :mod:`tools.website.sources`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # `mkdocs` without `python -m`
    sys.path.insert(0, str(ROOT))

from tools.website.equations import with_mathml  # noqa: E402
from tools.website.notes import with_reasons  # noqa: E402
from tools.website.sources import Sources  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file outside of ``docs/`` that a page links to, directly or through another such file."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, text in Sources(ROOT).pages().items():
        file = File.generated(config, name, content=text)
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave ``docs/`` to the pages of :func:`on_files`, and say which blocks no test runs."""
    return with_reasons(Sources(ROOT).relinked(markdown, page.file.src_uri))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations as MathML."""
    return with_mathml(html)
