"""Checks that hold for every figure the experiments save."""

from __future__ import annotations

import os

import pytest
from matplotlib.figure import Figure

from eva_lightning import plots

_save = plots.save


def _checked(figure: Figure, file: str | os.PathLike[str], dpi: int = 120) -> None:
    _save(figure, file, dpi)
    words = [getattr(figure, name, None) for name in ("_suptitle", "_supxlabel", "_supylabel")]
    boxes = {text.get_text(): text.get_window_extent() for text in words if text is not None and text.get_text()}
    for legend in figure.legends:
        for text, box in boxes.items():
            covered = legend.get_window_extent().overlaps(box)
            assert not covered, f"{os.fspath(file)}: the figure's legend covers its label {text!r}"


@pytest.fixture(autouse=True)
def legends_cover_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's layout keeps legends outside of axes apart from axes only, not from the figure's own labels."""
    monkeypatch.setattr(plots, "save", _checked)
