"""The digest of sources changes with what it is of, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.comparisons import source_digest as module
from experiments.comparisons.source_digest import source_digest


def test_digest_follows_sources_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    package = tmp_path / "eva_lightning"
    for name in ("a.py", "plots.py", "vision/b.py", "vision/notes.txt"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")

    def digest(without: list[str], packages: tuple[str, ...] = ("torch",)) -> str:
        return source_digest(["eva_lightning", "eva_lightning/a.py"], without, packages)

    every, part = digest([]), digest(["eva_lightning/vision"])
    assert every != part
    (package / "plots.py").write_text("2")
    (package / "vision" / "notes.txt").write_text("2")
    assert (digest([]), digest(["eva_lightning/vision"])) == (every, part)
    (package / "vision" / "b.py").write_text("2")
    assert digest([]) != every
    assert digest(["eva_lightning/vision"]) == part
    (package / "a.py").write_text("2")
    assert digest(["eva_lightning/vision"]) != part
    assert digest([], ("torch", "lightning")) != digest([])
