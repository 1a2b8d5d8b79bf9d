"""Pages of the site for files outside of ``docs/`` that its pages link to: examples, configurations, CONTRIBUTING."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

_LINK = re.compile(r"(!?\[(?:[^\]\[]|\[[^\]]*\])*\]\()([^)#\s]+)([^)]*\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}
#: Where these pages lie on the site.
FOLDER = "source"


class Sources:
    """Files of the repository outside of ``docs/``, as pages.

    Args:
        root: The checkout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def pages(self) -> dict[str, str]:
        """Name of the page within the site -> its Markdown."""
        todo = [path.relative_to(self.root).as_posix() for path in sorted((self.root / "docs").rglob("*.md"))]
        made: dict[str, str] = {}
        while todo:
            name = todo.pop()
            for target in self._targets(name):
                page = self._page(target)
                if page is not None and page not in made:
                    made[page] = self._text(target)
                    todo += [target] if target.endswith(".md") else []
        return made

    def relinked(self, markdown: str, page: str) -> str:
        """`markdown` of the site's page `page`, with links that leave ``docs/`` leading to pages of :meth:`pages`."""
        name = self._origin(page)

        def link(found: re.Match[str]) -> str:
            target = self._resolved(name, found[2])
            if target is None:
                return found[0]
            on_site = target.removeprefix("docs/") if target.startswith("docs/") else self._page(target)
            if on_site is None:
                return found[0]
            return f"{found[1]}{posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{found[3]}"

        return _LINK.sub(link, markdown)

    def _targets(self, name: str) -> list[str]:
        """Files outside of ``docs/`` that the file `name` links to."""
        text = (self.root / name).read_text(encoding="utf-8")
        found = [self._resolved(name, link[1]) for link in _LINK.findall(text)]
        return [target for target in found if target is not None and not target.startswith("docs/")]

    def _resolved(self, name: str, link: str) -> str | None:
        """The file, from the root, that a link in the file `name` leads to; None: not one of the repository."""
        if ":" in link or link.startswith("/"):
            return None
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
        inside = not target.startswith("..") and (self.root / target).is_file()
        return target if inside else None

    def _origin(self, page: str) -> str:
        """The file, from the root, that a page of the site was made of."""
        if not page.startswith(f"{FOLDER}/"):
            return f"docs/{page}"
        origin = page.removeprefix(f"{FOLDER}/")
        return origin if (self.root / origin).is_file() else origin.removesuffix(".md")

    def _page(self, target: str) -> str | None:
        """The page for a file of the repository; None where it is no text to show."""
        suffix = posixpath.splitext(target)[1]
        if suffix == ".md":
            return f"{FOLDER}/{target}"
        return f"{FOLDER}/{target}.md" if suffix in (*_LANGUAGES, ".ipynb", ".cff") else None

    def _text(self, target: str) -> str:
        text = (self.root / target).read_text(encoding="utf-8")
        suffix = posixpath.splitext(target)[1]
        if suffix == ".md":
            return text
        if suffix == ".ipynb":
            return notebook_as_markdown(text)
        return f"# {target}\n\n{_fenced(text, _LANGUAGES.get(suffix, 'yaml'))}\n"


def notebook_as_markdown(text: str) -> str:
    """The cells of a notebook (its JSON) in order, code as fenced blocks."""
    shown = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        shown.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
    return "\n\n".join(shown) + "\n"


def _fenced(code: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"
