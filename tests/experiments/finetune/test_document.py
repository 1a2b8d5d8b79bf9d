"""docs/own-images.md: its Python runs from top to bottom, in an empty folder, against a stand-in of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

PAGE = ROOT / "docs" / "own-images.md"
#: What readers see as Python, and comments with what is there before: photographs, weights, the hub.
_CODE = re.compile(r"^```python\n(.*?)^```|<!-- run first:\n(.*?)-->", re.M | re.S)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    blocks = [found[1] or found[2] for found in _CODE.finditer(PAGE.read_text(encoding="utf-8"))]
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert sorted(path.name for path in (tmp_path / "hub/me").iterdir()) == ["trees", "trees-adapter"]
