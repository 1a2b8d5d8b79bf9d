"""SketchSVD against dense SVD: accuracy, bias, exact moments, and what a one-pass sketch could miss."""

from __future__ import annotations

import pytest
import torch

from eva_lightning.svd import ExactSVD, SketchSVD
from eva_lightning.svd.eigensolver import gaussian
from tests.svd_helpers import assert_orthonormal, captured_variance, decaying, digits, feed, held_bytes, reference


def test_equals_the_dense_svd_when_it_keeps_every_direction() -> None:
    x, _ = digits()
    result = feed(SketchSVD(64, 32), x.split(100)).result()
    assert torch.allclose(result.singular_values.double(), reference(x)[0][:32], rtol=1e-4)
    assert captured_variance(x, result.components) >= 0.99999


@pytest.mark.parametrize(("power", "captured", "bias"), [(0.5, 0.995, 0.10), (1.0, 0.9999, 0.005)])
def test_captures_decaying_spectra_and_never_overestimates(power: float, captured: float, bias: float) -> None:
    x, k = decaying(4000, 512, power=power), 32
    sigma, _ = reference(x)
    result = feed(SketchSVD(512, k), x.split(400)).result()
    assert captured_variance(x, result.components) >= captured
    shortfall = 1 - result.singular_values.double().square() / sigma[:k].square()
    assert float(shortfall.min()) >= -1e-4
    assert float(shortfall.max()) <= bias
    assert result.total_variance == pytest.approx(float(sigma.square().sum()), rel=1e-5)
    assert torch.allclose(result.mean.double(), x.double().mean(0), atol=1e-4)
    assert result.n_samples == 4000
    assert_orthonormal(result.components)


def test_finds_directions_orthogonal_to_everything_before() -> None:
    first, second = torch.zeros(200, 400), torch.zeros(200, 400)
    first[:, :50] = decaying(200, 50, mean=0)
    second[:, 200:250] = 10 * decaying(200, 50, mean=0, seed=1)
    engine = feed(SketchSVD(400, 8), [*first.split(50), *second.split(50)])
    assert captured_variance(torch.cat([first, second]), engine.result().components) >= 0.99


def test_a_class_sorted_stream_loses_nothing() -> None:
    x, y = digits()
    x = x[y.argsort()]
    assert captured_variance(x, feed(SketchSVD(64, 8), x.split(64)).result().components) >= 0.997


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_any_dtype_shape_strides_and_mask(dtype: torch.dtype) -> None:
    x = decaying(800, 200).reshape(8, 100, 200).to(dtype)
    mask = torch.rand(8, 100, generator=torch.Generator().manual_seed(0)) < 0.6
    padded = x.clone()
    padded[~mask] = float("nan")
    engine = SketchSVD(200, 8)
    for rows, keep in zip(padded.split(2), mask.split(2), strict=True):
        engine.update(rows.transpose(0, 1), keep.T)
    assert engine.n_samples == int(mask.sum())
    assert captured_variance(x[mask], engine.result().components) >= 0.9995


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_a_large_mean_does_no_harm(mean: float) -> None:
    x = decaying(2000, 128, mean=mean)
    result = feed(SketchSVD(128, 16), x.split(200)).result()
    assert captured_variance(x, result.components) >= 0.9995
    assert result.total_variance == pytest.approx(float(reference(x)[0].square().sum()), rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_constant_inputs_have_no_variance(value: float) -> None:
    result = feed(SketchSVD(300, 8), [torch.full((50, 300), value), torch.full((90, 300), value)]).result()
    assert result.total_variance == 0.0
    assert result.explained_variance_ratio.eq(0).all()
    assert_orthonormal(result.components)


@pytest.mark.parametrize("sizes", [[2, 3], [1, 40, 1, 60], [33, 200]])
def test_small_and_uneven_batches(sizes: list[int]) -> None:
    x = decaying(sum(sizes), 300)
    result = feed(SketchSVD(300, 16), x.split(sizes)).result()
    kept = min(16, len(x) - 1)
    assert captured_variance(x, result.components[:kept]) >= 0.999
    assert result.singular_values[kept:].eq(0).all()
    assert result.total_variance == pytest.approx(float(reference(x)[0].square().sum()), rel=1e-5)
    assert_orthonormal(result.components)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_refused_before_they_do_harm(bad: float) -> None:
    x = decaying(100, 64)
    engine = feed(SketchSVD(64, 4), [x])
    before = engine.result()
    broken = x.clone()
    broken[3, 5] = bad
    for batch in (broken, broken[3:5]):
        with pytest.raises(FloatingPointError, match="NaN or Inf"):
            engine.update(batch)
    assert engine.n_samples == 100
    assert torch.equal(engine.result().components, before.components)


def test_merge_captures_the_union() -> None:
    x = decaying(2000, 256)
    left, right = feed(SketchSVD(256, 16), x[:700].split(100)), feed(SketchSVD(256, 16), x[700:].split(100))
    for engine in (left.clone().merge(right), right.clone().merge(left), SketchSVD(256, 16).merge(left).merge(right)):
        result = engine.result()
        assert captured_variance(x, result.components) >= 0.999
        assert result.n_samples == 2000
        assert result.total_variance == pytest.approx(float(reference(x)[0].square().sum()), rel=1e-5)


def test_captured_estimates_what_the_covariance_says() -> None:
    x = decaying(3000, 400)
    half = feed(SketchSVD(400, 16), x[:1500].split(300)).result().components
    engine, exact = feed(SketchSVD(400, 16), x.split(300)), feed(ExactSVD(400, 16), [x])
    assert engine.captured(half) == pytest.approx(exact.captured(half), abs=2e-3)


def test_repeats_are_identical_to_the_bit() -> None:
    x = decaying(900, 300)
    one, two = (feed(SketchSVD(300, 16), x.split(150)).result() for _ in range(2))
    assert torch.equal(one.components, two.components)
    assert torch.equal(one.singular_values, two.singular_values)


def _wide(dim: int, n: int, seed: int) -> torch.Tensor:
    """Tokens with eigenvalues j**-1.4 and a mean, mixed by reflections: no basis of `dim` squared numbers is needed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator) * torch.arange(1, dim + 1) ** -0.7
    for i in range(3):
        v = gaussian(dim, 1, x.device, seed=i)
        v /= v.norm()
        x -= 2 * (x @ v) @ v.T
    return x + gaussian(1, dim, x.device, seed=9)


@pytest.mark.parametrize("dim", [4096, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (8192, 14336, 28672))])
def test_wide_layers(dim: int) -> None:
    batches, k = [_wide(dim, 256, seed) for seed in range(8)], 32
    engine = SketchSVD(dim, k)
    feed(engine, batches)
    result = engine.result()
    x = torch.cat(batches)
    x = (x - x.mean(0)).double()
    gram = x @ x.T
    values = torch.linalg.eigvalsh(gram).flip(0)[:k]
    captured = float((x @ result.components.double().T).square().sum() / values.sum())
    shortfall = 1 - result.singular_values.double().square() / values
    print(f"width {dim}: captured {captured:.6f}, eigenvalues low by {shortfall.median():.2%} (median), "
          f"{shortfall.max():.2%} (largest), {engine.state_bytes / 2**20:.1f} MiB")  # fmt: skip
    assert captured >= 0.995
    assert float(shortfall.median()) <= 0.03
    assert result.total_variance == pytest.approx(float(gram.trace()), rel=1e-5)
    assert held_bytes(engine, dim) <= engine.state_bytes <= 4 * dim * (8 * k + 29)
