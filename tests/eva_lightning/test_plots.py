"""Figures show the numbers they are given, and drawing them changes nothing outside."""

from __future__ import annotations

import re

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from eva_lightning import plots

RANKS = {f"model.blocks.{i}.{kind}": i + j for i in range(3) for j, kind in enumerate(("attn.qkv", "mlp.fc1"))}


def test_the_rank_map_has_every_layer_of_several_networks() -> None:
    names = [f"{part}.blocks.{i}.{kind}" for part in ("text", "image") for i in (0, 1) for kind in ("q", "v")]
    ranks = {name: rank for rank, name in enumerate(["embed", *names, "text.blocks.1.gate"], start=1)}
    axes = plots.rank_heatmap(ranks).axes[0]
    assert sorted(int(text.get_text()) for text in axes.texts) == list(ranks.values())
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == ["embed", "text.blocks.*.q", "text.blocks.*.v", "image.blocks.*.q", "image.blocks.*.v", "gate"]


def test_layer_names_split_at_the_last_number() -> None:
    assert plots.split_layer_name("model.blocks.11.attn.qkv") == (11, "attn.qkv")
    assert plots.split_layer_name("encoder.2.layer.5.fc") == (5, "fc")
    assert plots.split_layer_name("head") == (None, "head")
    assert plots.split_layer_name("net.0") == (None, "net.0")


def test_rank_heatmap_places_every_layer() -> None:
    figure = plots.rank_heatmap({**RANKS, "embed": 7}, uniform_rank=2)
    axes = figure.axes[0]
    grid = np.ma.filled(axes.images[0].get_array(), np.nan)
    expected = [[0, 1, 2, np.nan], [1, 2, 3, np.nan], [np.nan, np.nan, np.nan, 7]]
    np.testing.assert_array_equal(grid, expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "other"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn.qkv", "mlp.fc1", "embed"]
    assert sorted(text.get_text() for text in axes.texts) == sorted(map(str, [0, 1, 2, 1, 2, 3, 7]))


def test_a_title_is_text_and_no_formula() -> None:
    title = "my $5 & #6_x^, $y"
    figure = plots.learning_curves({"training": np.ones((1, 3))}, "loss", title=title)
    figure.canvas.draw()
    assert figure.axes[0].get_title(loc="left") == title


def test_rank_heatmap_of_equal_ranks_is_drawn() -> None:
    plots.rank_heatmap(dict.fromkeys(RANKS, 4)).canvas.draw()


def test_rank_bars_have_the_ranks_as_lengths() -> None:
    axes = plots.rank_bars(RANKS, uniform_rank=2).axes[0]
    assert [bar.get_width() for bar in axes.patches] == list(RANKS.values())
    assert [label.get_text() for label in axes.get_yticklabels()] == list(RANKS)


def test_spectra_draw_one_line_per_layer_and_one_legend_entry_per_kind() -> None:
    ratios = {name: [0.5, 0.25, 0.0] for name in RANKS}
    figure = plots.spectra(ratios)
    axes = figure.axes[0]
    assert len(axes.lines) == len(RANKS)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attn.qkv", "mlp.fc1"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.5, 0.25, np.nan])
    figure.canvas.draw()


def test_convergence_shows_points_and_threshold() -> None:
    axes = plots.convergence({"blocks.0.fc1": [(2, 0.9), (4, 0.99)], "blocks.1.fc1": []}, tau=0.99).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[2, 0.9], [4, 0.99]])
    assert axes.lines[-1].get_ydata()[0] == 0.99
    assert axes.get_xlabel() == "minibatches"


def test_learning_curves_draw_mean_and_confidence_band() -> None:
    values = np.array([[1.0, 0.5], [3.0, 1.5]])
    axes = plots.learning_curves({"LoRA": values}, "loss").axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 2.0], [2, 1.0]])
    band = axes.collections[0].get_paths()[0].vertices
    # Two runs, standard deviation sqrt(2): the standard error is 1, and t(0.975) with 1 degree of freedom 12.7.
    assert band[band[:, 0] == 1][:, 1].min() == pytest.approx(2 - 12.7062, abs=1e-3)
    assert band[band[:, 0] == 1][:, 1].max() == pytest.approx(2 + 12.7062, abs=1e-3)


def test_learning_curves_of_one_run_have_no_band() -> None:
    assert not plots.learning_curves({"LoRA": np.ones((1, 3))}, "accuracy", percent=True).axes[0].collections


def test_rate_sensitivity_rings_the_lowest_point() -> None:
    figure = plots.rate_sensitivity({"LoRA": {1e-2: 0.2, 1e-3: 0.9, 1e-1: 0.5}}, "loss")
    line, ring = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[1e-3, 0.9], [1e-2, 0.2], [1e-1, 0.5]])
    np.testing.assert_array_equal(ring.get_xydata(), [[1e-2, 0.2]])
    figure.canvas.draw()


@pytest.mark.parametrize("scores", [(0.66, 0.79, 1.43), (1.9, 2.4), (1e-4, 3e-4), (0.5, 80.0, 3e6)], ids=str)
def test_a_logarithmic_axis_of_any_range_can_be_read(scores: tuple[float, ...]) -> None:
    figure = plots.rate_sensitivity({"LoRA": {10.0**-i: score for i, score in enumerate(scores)}}, "loss")
    axes = figure.axes[0]
    figure.canvas.draw()
    low, high = axes.get_ylim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_yticks()) <= 12


def test_kinds_of_layers_have_the_same_colours_in_all_figures_of_a_model() -> None:
    spectra = plots.spectra({name: [0.5, 0.25] for name in RANKS})
    convergence = plots.convergence({name: [(2, 0.9), (4, 0.99)] for name in reversed(RANKS)})
    looks = [
        [
            (text.get_text(), handle.get_color())
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        ]
        for legend in (figure.axes[0].get_legend() for figure in (spectra, convergence))
    ]
    assert looks[0] == looks[1]
    assert len({colour for _, colour in looks[0]}) == 2


def test_the_legend_of_many_lines_hides_none_of_them() -> None:
    figure = plots.learning_curves(
        {f"EVA, lr 0.00{i}, split train800val200": np.ones((2, 3)) for i in range(6)}, "loss"
    )
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert figure.axes[0].get_legend() is None
    axes, below = figure.axes[0].get_window_extent(), legend.get_window_extent()
    assert below.y1 <= axes.y0
    assert figure.bbox.x0 <= below.x0 < below.x1 <= figure.bbox.x1


def test_image_grid_draws_every_image() -> None:
    images = np.arange(3 * 4).reshape(3, 2, 2)
    figure = plots.image_grid(images, ["5", "6", "7"], columns=2, title="digits")
    assert [axes.get_title() for axes in figure.axes] == ["5", "6", "7"]
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), images[2])


@pytest.mark.parametrize(
    "draw", [plots.rank_heatmap, plots.rank_bars, plots.spectra, plots.convergence, plots.rate_sensitivity]
)
def test_nothing_to_draw_is_refused(draw: object) -> None:
    with pytest.raises(ValueError, match="at least one entry"):
        draw({}, *(["loss"] if draw is plots.rate_sensitivity else []))  # type: ignore[operator]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must have shape \(runs, epochs\), got \(3,\)"):
        plots.learning_curves({"LoRA": np.ones(3)}, "loss")
    with pytest.raises(ValueError, match="one caption each"):
        plots.image_grid(np.ones((2, 8, 8)), ["5"])


def test_pyplot_and_its_backend_are_left_alone() -> None:
    settings, open_figures = dict(matplotlib.rcParams), plt.get_fignums()
    plots.rank_bars(RANKS).canvas.draw()
    plots.spectra({name: [0.5, 0.25] for name in RANKS}).canvas.draw()
    assert dict(matplotlib.rcParams) == settings
    assert plt.get_fignums() == open_figures


CURVES = {"LoRA": np.array([[1.0, 0.5], [3.0, 1.5]]), "EVA": np.array([[0.9, 0.4]])}
FIGURES = {
    "rank_heatmap": lambda: plots.rank_heatmap(RANKS, 2),
    "rank_bars": lambda: plots.rank_bars(RANKS, 2),
    "spectra": lambda: plots.spectra({name: [0.5, 0.25] for name in RANKS}),
    "convergence": lambda: plots.convergence({"blocks.0.fc1": [(2, 0.9), (4, 0.99)]}, tau=0.99),
    "learning_curves": lambda: plots.learning_curves(CURVES, "cross-entropy (nats)"),
    "accuracies": lambda: plots.learning_curves(CURVES, "accuracy", percent=True),
    "rate_sensitivity": lambda: plots.rate_sensitivity({"LoRA": {1e-2: 0.2, 1e-3: 0.9}}, "cross-entropy (nats)"),
    "convergence_counts": lambda: plots.convergence_counts({8: [(1.0, 2), (2.0, 3)]}, 4),
    "component_similarity": lambda: plots.component_similarity({"overlap": [1.0, 0.5]}),
    "similarity_matrix": lambda: plots.similarity_matrix(np.eye(2), [4, 8]),
    "rank_maps": lambda: plots.rank_maps({1.0: RANKS, 2.0: RANKS}, 2),
    "ranks_by_kind": lambda: plots.ranks_by_kind({1.0: RANKS}, 2),
    "early_steps": lambda: plots.early_steps({"gradient norm of B": {"EVA": {1.0: [0.5], 2.0: [0.4]}}}),
    "grouped_bars": lambda: plots.grouped_bars({"LoRA": {"qkv": 1.0}, "EVA": {"qkv": 2.0}}, "distance"),
}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_axes_are_labelled_in_one_notation_and_colours_are_explained(name: str) -> None:
    figure = FIGURES[name]()
    figure.canvas.draw()
    explained = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend() is not None)]
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert explained or all(axes.get_ylabel() for axes in bars)
    assert explained or bars
    for axes in figure.axes:
        for label in (axes.get_xlabel(), axes.get_ylabel()):
            # words in small letters, or a symbol, then perhaps a unit in parentheses
            assert re.fullmatch(r"([a-zρ][^()%÷]*|mean \|cos\|)?( \([^()]+\))?", label), label
        numbers = [tick.get_text() for tick in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert not any(number.endswith("%") for number in numbers)


def test_percentages_are_hundred_times_the_shares() -> None:
    axes = FIGURES["accuracies"]().axes[0]
    assert axes.get_ylabel() == "accuracy (%)"
    axes.figure.canvas.draw()
    shown = {tick.get_position()[1]: tick.get_text() for tick in axes.get_yticklabels()}
    assert all(float(text) == pytest.approx(100 * place) for place, text in shown.items())
