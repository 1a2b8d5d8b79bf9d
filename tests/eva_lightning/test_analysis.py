"""The paper's analyses: pinned to dense SVDs, SciPy's subspace angles and NumPy's norms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from eva_lightning import plots
from eva_lightning.analysis import (
    RHOS,
    adapter_distance,
    adapter_distances,
    adapter_matrices,
    collect_components,
    component_cosines,
    component_similarity,
    convergence_curve,
    rank_deltas,
    rank_maps,
    similarity_matrix,
    subspace_overlap,
)
from eva_lightning.state import EVAState
from tests.svd_helpers import decaying, reference

DIM, K = 24, 4


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, 16)
        self.second = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def model() -> TwoLayers:
    return TwoLayers()


def layers(model: TwoLayers) -> dict[str, nn.Module]:
    return {"first": model.first, "second": model.second}


def orthonormal(seed: int, k: int = K, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, k, generator=generator)).Q.T


@pytest.mark.parametrize("engine", ["exact", "incremental"])
def test_components_are_those_of_a_dense_svd(model: TwoLayers, engine: str) -> None:
    x = decaying(400, DIM, power=1.5)
    found = collect_components(model, x.split(50), layers(model), K, engine)
    for name, inputs in (("first", x), ("second", torch.tanh(model.first(x)).detach())):
        expected = reference(inputs)[1][:K].float()
        assert component_cosines(found[name], expected).min() > 0.999, name


def test_the_model_is_left_as_it_was(model: TwoLayers) -> None:
    model.train()
    convergence_curve(model, decaying(40, DIM).split(20), layers(model), K)
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in layers(model).values())


def test_convergence_counts_samples_and_ends_with_all_components(model: TwoLayers) -> None:
    x = decaying(60, DIM, power=1.5)
    curve = convergence_curve(model, [(x, torch.zeros(60))] * 5, layers(model), K, engine="exact")
    assert [point.n_batches for point in curve] == [1, 2, 3, 4, 5]
    assert [point.n_samples for point in curve] == [60, 120, 180, 240, 300]
    # nothing to compare the first with; the same minibatch again changes no direction
    assert [point.converged for point in curve] == [0, 2 * K, 2 * K, 2 * K, 2 * K]
    assert {point.total for point in curve} == {2 * K}
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(curve))


def test_cosines_ignore_the_sign() -> None:
    a = orthonormal(0)
    flipped = a * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    np.testing.assert_allclose(component_cosines(a, flipped), 1, atol=1e-6)


def test_overlap_is_the_mean_squared_cosine_of_scipys_subspace_angles() -> None:
    a, b = orthonormal(1), orthonormal(2)
    expected = [
        np.square(np.cos(scipy.linalg.subspace_angles(a[:j].T.double().numpy(), b[:j].T.double().numpy()))).mean()
        for j in range(1, K + 1)
    ]
    np.testing.assert_allclose(subspace_overlap(a, b), expected, rtol=1e-6)


def test_a_rotation_changes_cosines_and_not_the_span() -> None:
    a = orthonormal(3)
    c, s = math.cos(0.7), math.sin(0.7)
    b = torch.cat([a[:2], torch.tensor([[c, s], [-s, c]]) @ a[2:]])
    similarity = component_similarity([{"layer": a}, {"layer": b}])
    np.testing.assert_allclose(similarity.cosine, [1, 1, c, c], atol=1e-6)
    np.testing.assert_allclose(similarity.overlap[[0, 1, 3]], 1, atol=1e-6)


def test_similarity_matrix_averages_layers() -> None:
    a, b = orthonormal(4), orthonormal(5)
    runs = {4: {"x": a, "y": a}, 8: {"x": a, "y": b}}
    expected = (1 + float((a * b).sum(1).abs().mean())) / 2
    np.testing.assert_allclose(similarity_matrix(runs), [[1, expected], [expected, 1]], atol=1e-6)


def state(k: int = 12) -> EVAState:
    spectra = {name: torch.arange(1, 33) ** -power for name, power in (("a", 0.2), ("b", 0.6), ("c", 2.0))}
    return EVAState(
        components={name: orthonormal(0, k, 32) for name in spectra},
        singular_values={name: sigma[:k] for name, sigma in spectra.items()},
        explained_variance_ratio={n: (s[:k] ** 2 / s.square().sum()) for n, s in spectra.items()},
        total_variance={name: float(sigma.square().sum()) for name, sigma in spectra.items()},
        n_samples=dict.fromkeys(spectra, 100),
    )


def test_rank_maps_keep_the_budget_and_start_uniform() -> None:
    maps = rank_maps(state(), 4)
    assert list(maps) == list(RHOS)
    assert set(maps[1.0].values()) == {4}
    assert all(sum(ranks.values()) == 12 and max(ranks.values()) <= round(4 * rho) for rho, ranks in maps.items())
    deltas = rank_deltas(maps)
    assert list(deltas) == list(RHOS[1:])
    for name in "abc":
        assert maps[1.0][name] + sum(delta[name] for delta in deltas.values()) == maps[3.0][name]


def test_distance_is_numpys() -> None:
    a, b = orthonormal(6), orthonormal(7)
    distance = adapter_distance(a, b)
    assert distance.spectral_norm == pytest.approx(np.linalg.norm((a - b).numpy(), ord=2), rel=1e-6)
    assert distance.cosine == pytest.approx(float((a * b).sum(1).mean()), abs=1e-6)
    same = adapter_distances({"x": a, "only here": a}, {"x": a})
    assert list(same) == ["x"]
    assert (same["x"].spectral_norm, same["x"].cosine) == (0, pytest.approx(1))


def test_adapter_matrices_are_copies(model: TwoLayers) -> None:
    from eva_lightning.adapters import find_adapters, inject

    inject(model, r=2, head=None)
    before = adapter_matrices(model)
    assert {name: tuple(a.shape) for name, a in before.items()} == {"first": (2, DIM), "second": (2, 16)}
    with torch.no_grad():
        for layer in find_adapters(model).values():
            layer.a.zero_()
    assert all(a.abs().sum() > 0 for a in before.values())


def test_mistakes_are_named(model: TwoLayers) -> None:
    a = orthonormal(8)
    with pytest.raises(ValueError, match="at least one minibatch"):
        convergence_curve(model, [], layers(model), K)
    with pytest.raises(ValueError, match="tau must be a number above 0 and of at most 1, got 0"):
        convergence_curve(model, [torch.ones(2, DIM)], layers(model), K, tau=0)
    with pytest.raises(ValueError, match="equal shapes"):
        component_cosines(a, a[:2])
    with pytest.raises(ValueError, match="'b' is in only some"):
        component_similarity([{"a": a}, {"b": a, "a": a}])
    with pytest.raises(ValueError, match="at least two runs, got 1"):
        component_similarity([{"a": a}])
    with pytest.raises(ValueError, match="no layer in common"):
        adapter_distances({"a": a}, {"b": a})


def test_figures_show_the_numbers() -> None:
    counts = plots.convergence_counts({4: [(1, 0), (2, 5)], 8: [(1, 0), (2, 8)]}, total=8).axes[0]
    np.testing.assert_array_equal(counts.lines[1].get_xydata(), [[1, 0], [2, 8]])
    assert counts.lines[-1].get_ydata()[0] == 8
    curve = plots.component_similarity({"cos": [1.0, 0.5]}).axes[0]
    np.testing.assert_array_equal(curve.lines[0].get_xydata(), [[1, 1.0], [2, 0.5]])
    table = plots.similarity_matrix(np.array([[1, 0.25], [0.25, 1]]), [4, 8]).axes[0]
    assert sorted(text.get_text() for text in table.texts) == ["0.25", "0.25", "1.00", "1.00"]
    maps = {1.0: {"blocks.0.fc": 4, "blocks.1.fc": 4}, 2.0: {"blocks.0.fc": 6, "blocks.1.fc": 2}}
    axes = plots.rank_maps(maps, neutral=4).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[4, 4], [6, 2]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.fc", "1.fc"]
    bars = plots.grouped_bars({"LoRA": {"qkv": 2.0, "fc": 3.0}, "EVA": {"qkv": 1.0}}, "distance").axes[0]
    assert [bar.get_height() for bar in bars.patches][:3] == [2.0, 3.0, 1.0]
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        plots.similarity_matrix(np.ones((2, 3)), [4, 8])


def test_figures_of_types_steps_and_bars_show_the_numbers() -> None:
    maps = {
        1.0: {"blocks.0.fc": 4, "blocks.1.fc": 2, "blocks.0.proj": 6},
        2.0: dict.fromkeys(("blocks.0.fc", "blocks.1.fc", "blocks.0.proj"), 8),
    }
    axes = plots.ranks_by_kind(maps, neutral=4).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[3, 8], [6, 8]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fc", "proj"]
    steps = {"LoRA": {1.0: [1.0, 3.0], 2.0: [4.0, 4.0]}, "EVA": {1.0: [0.0]}}
    figure = plots.early_steps({"norm": steps, "loss": {"EVA": {1.0: [2.0]}}}, logarithmic=["norm"])
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[1, 2], [2, 4]])
    assert (first.get_yscale(), second.get_yscale()) == ("log", "linear")
    assert first.lines[1].get_color() == second.lines[0].get_color()  # EVA's, in both
    bars = plots.horizontal_bars({"LoRA": 1.0, "EVA": 2.5}, "seconds").axes[0]
    assert [bar.get_width() for bar in bars.patches] == [1.0, 2.5]
    assert [text.get_text().strip() for text in bars.texts] == ["1", "2.5"]
