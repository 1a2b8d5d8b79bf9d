"""A state as a table of pandas and as figures."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from eva_lightning import EVAState
from eva_lightning.errors import InputError, MissingPackageError

RATIO = {"blocks.0.q": [0.5, 0.3, 0.1], "blocks.1.q": [0.9, 0.05, 0.01]}


def made() -> EVAState:
    tensors = {name: torch.tensor(ratio) for name, ratio in RATIO.items()}
    return EVAState(
        ranks={"blocks.0.q": 2, "blocks.1.q": 1, "blocks.1.idle": 0},
        singular_values={name: 10 * ratio.sqrt() for name, ratio in tensors.items()},
        explained_variance_ratio=tensors,
        total_variance=dict.fromkeys(RATIO, 100.0),
        n_samples=dict.fromkeys(RATIO, 40),
        converged=dict.fromkeys(RATIO, True),
        widths=dict.fromkeys(RATIO, 8),
        meta={"r": 1},
    )


def test_one_row_per_layer() -> None:
    frame = made().to_pandas()
    assert list(frame.index) == ["blocks.0.q", "blocks.1.q", "blocks.1.idle"]
    assert frame.index.name == "layer"
    assert list(frame["rank"]) == [2, 1, 0]
    assert list(frame["components"]) == [3, 3, 0]
    assert list(frame["explained"][:2]) == pytest.approx([0.8, 0.9])
    assert math.isnan(frame["explained"].iloc[2])
    assert (frame["rank"] * frame["width"]).sum() == 24


def test_a_state_without_ranks_is_an_empty_table() -> None:
    frame = EVAState().to_pandas()
    assert frame.empty
    assert list(frame.columns) == list(made().to_pandas().columns)


def test_the_rank_map_shows_the_ranks_around_r() -> None:
    figure = made().plot_ranks(title="ranks")
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0", "1", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "idle"]
    assert axes.images[0].norm.vcenter == 1  # type: ignore[attr-defined]
    assert axes.get_title(loc="left") == "ranks"
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it"  # type: ignore[attr-defined]


def test_the_spectra_are_the_ratios() -> None:
    lines = made().plot_spectra().axes[0].lines
    drawn = {tuple(np.asarray(line.get_ydata(), dtype=float).round(6)) for line in lines}
    assert drawn == {tuple(ratio) for ratio in RATIO.values()}


@pytest.mark.parametrize("name", ["plot_ranks", "plot_spectra"])
def test_nothing_to_draw_is_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match="must hold at least one entry, got none"):
        getattr(EVAState(), name)()


@pytest.mark.parametrize(
    ("name", "missing"),
    [("to_pandas", "pandas"), ("plot_ranks", "matplotlib"), ("plot_spectra", "scipy")],
)
def test_a_missing_package_is_one_sentence(name: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [module for module in sys.modules if module.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.delitem(sys.modules, "eva_lightning.plots", raising=False)
    with pytest.raises(
        MissingPackageError,
        match=rf"EVAState\.{name} needs {missing}, which is not installed: pip install 'eva_lightning\[plots\]'",
    ):
        getattr(made(), name)()
