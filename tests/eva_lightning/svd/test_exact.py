"""ExactSVD against dense SVD, scikit-learn's PCA, and everything a forward hook may throw at it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from eva_lightning.svd import ExactSVD
from eva_lightning.svd.eigensolver import gaussian, orthonormal_columns, top_eigenpairs
from tests.svd_helpers import (
    assert_orthonormal,
    captured_variance,
    decaying,
    digits,
    feed,
    held_bytes,
    held_tensors,
    reference,
)

WIDTHS = [48, 192, 200, 640]


@pytest.mark.parametrize("dim", WIDTHS)
def test_equals_the_dense_svd_of_all_tokens(dim: int) -> None:
    x, k = decaying(1500, dim), 16
    sigma, v = reference(x)
    result = feed(ExactSVD(dim, k), x.split(170)).result()
    assert captured_variance(x, result.components) >= 1 - 1e-6
    assert torch.allclose(result.singular_values.double(), sigma[:k], rtol=1e-4)
    assert result.total_variance == pytest.approx(float(sigma.square().sum()), rel=1e-5)
    assert torch.allclose(result.explained_variance_ratio.double(), sigma[:k] ** 2 / (sigma**2).sum(), rtol=2e-4)
    assert torch.allclose(result.mean.double(), x.double().mean(0), atol=1e-5)
    assert ((result.components.double() * v[:k]).sum(1).abs()[:4] > 0.9999).all()
    assert result.n_samples == 1500
    assert_orthonormal(result.components)


def test_equals_scikit_learns_pca_on_digits() -> None:
    x, _ = digits()
    pca = PCA(n_components=16, svd_solver="full").fit(x.double().numpy())
    result = feed(ExactSVD(64, 16), x.split(100)).result()
    assert captured_variance(x, result.components) >= 0.9999
    assert torch.allclose(result.singular_values.double(), torch.from_numpy(pca.singular_values_), rtol=1e-4)
    ratio = torch.from_numpy(pca.explained_variance_ratio_)
    assert torch.allclose(result.explained_variance_ratio.double(), ratio, rtol=1e-4)
    cosine = (result.components.double() * torch.from_numpy(pca.components_)).sum(1).abs()
    assert cosine.min() > 0.9999


SPECTRA = {
    "flat": torch.ones(320),
    "slow decay": torch.arange(1, 321) ** -0.5,
    "one dominating direction": torch.cat([torch.tensor([100.0]), torch.arange(1, 320) ** -0.5]),
    "gap just before k": torch.cat([torch.full((31,), 10.0), torch.ones(289)]),
    "rank 5": (torch.arange(320) < 5).float(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_subspace_iteration_reaches_the_documented_tolerance(name: str) -> None:
    basis = torch.linalg.qr(gaussian(320, 320, torch.device("cpu"))).Q
    x = torch.randn(1500, 320, generator=torch.Generator().manual_seed(1)) * SPECTRA[name] @ basis
    result = feed(ExactSVD(320, 32), [x]).result()
    assert captured_variance(x, result.components) >= 1 - 1e-6
    # Below a dominating direction the others must be right too, not only their negligible share of the sum.
    rest = x - (x @ result.components[:1].double().T.float()) @ result.components[:1]
    if name != "rank 5":
        assert captured_variance(rest, result.components[1:]) >= 1 - 2e-4
    assert_orthonormal(result.components)


def test_a_warm_start_finds_directions_it_has_never_seen() -> None:
    first, second = torch.zeros(200, 400), torch.zeros(200, 400)
    generator = torch.Generator().manual_seed(0)
    first[:, :50] = torch.randn(200, 50, generator=generator)
    second[:, 200:250] = 10 * torch.randn(200, 50, generator=generator)
    engine = ExactSVD(400, 8)
    engine.update(first)
    engine.result()
    engine.update(second)
    assert captured_variance(torch.cat([first, second]), engine.result().components) >= 1 - 1e-6


def test_is_invariant_to_batch_size_and_order() -> None:
    x = decaying(1200, 256)
    whole = feed(ExactSVD(256, 16), [x]).result()
    for batches in (x.split(7), x.split(333), x[torch.randperm(1200)].split(50)):
        other = feed(ExactSVD(256, 16), batches).result()
        assert torch.allclose(other.singular_values, whole.singular_values, rtol=1e-4)
        assert captured_variance(x, other.components) >= 1 - 1e-6
        assert other.total_variance == pytest.approx(whole.total_variance, rel=1e-5)


def test_captures_all_of_a_class_sorted_stream() -> None:
    x, y = digits()
    x = x[y.argsort()]
    assert captured_variance(x, feed(ExactSVD(64, 8), x.split(64)).result().components) >= 0.9999


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_inputs_with_a_large_mean_are_shifted_before_anything_is_rounded(mean: float) -> None:
    x = decaying(2000, 128, mean=mean)
    assert captured_variance(x, feed(ExactSVD(128, 16), x.split(100)).result().components) >= 0.9999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_any_floating_dtype_and_keeps_an_fp32_state(dtype: torch.dtype) -> None:
    x = decaying(600, 200).to(dtype)
    engine = feed(ExactSVD(200, 8), x.split(100))
    result = engine.result()
    assert captured_variance(x, result.components) >= 0.9999
    assert result.components.dtype == result.singular_values.dtype == torch.float32
    assert {t.dtype for t in held_tensors(engine) if t.ndim == 2} == {torch.float32}


def test_takes_any_shape_and_strides() -> None:
    x = decaying(240, 64)
    engine = ExactSVD(64, 4)
    engine.update(x[:100].reshape(5, 20, 64).transpose(0, 1))
    engine.update(x[100:200].T.contiguous().T)
    for row in x[200:]:
        engine.update(row)
    whole = feed(ExactSVD(64, 4), [x]).result()
    assert engine.n_samples == 240
    assert torch.allclose(engine.result().singular_values, whole.singular_values, rtol=1e-5)


def test_masks_are_exact_whatever_the_padding_holds() -> None:
    x = decaying(400, 64).reshape(8, 50, 64)
    mask = torch.rand(8, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    padded = x.clone()
    padded[~mask] = float("nan")
    masked = ExactSVD(64, 8)
    for rows, keep in zip(padded.split(2), mask.split(2), strict=True):
        masked.update(rows, keep)
    masked.update(padded, torch.zeros(8, 50, dtype=torch.bool))
    plain = feed(ExactSVD(64, 8), [x[mask]]).result()
    assert masked.n_samples == int(mask.sum())
    assert torch.allclose(masked.result().singular_values, plain.singular_values, rtol=1e-5)
    assert captured_variance(x[mask], masked.result().components) >= 1 - 1e-6


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_constant_inputs_have_no_variance(value: float) -> None:
    engine = feed(ExactSVD(300, 8), [torch.full((50, 300), value), torch.full((9, 300), value)])
    result = engine.result()
    assert result.total_variance == 0.0
    assert result.singular_values.eq(0).all()
    assert result.explained_variance_ratio.eq(0).all()
    assert engine.captured(torch.eye(300)[:8]) == 1.0
    assert_orthonormal(result.components)


def test_fewer_tokens_than_components() -> None:
    x = decaying(5, 300)
    result = feed(ExactSVD(300, 16), [x[:2], x[2:]]).result()
    assert result.components.shape == (16, 300)
    assert result.singular_values[4:].eq(0).all()
    assert torch.allclose(result.singular_values[:4].double(), reference(x)[0][:4], rtol=1e-4)
    assert_orthonormal(result.components)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_are_refused_before_they_do_harm(bad: float) -> None:
    x = decaying(100, 64)
    engine = feed(ExactSVD(64, 4), [x])
    broken = x.clone()
    broken[3, 5] = bad
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        engine.update(broken)
    assert engine.n_samples == 100
    assert torch.equal(engine.result().components, feed(ExactSVD(64, 4), [x]).result().components)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        ExactSVD(64, 4).update(broken)


def test_repeats_are_identical_to_the_bit() -> None:
    x = decaying(500, 300)
    one, two = (feed(ExactSVD(300, 16), x.split(64)).result() for _ in range(2))
    assert torch.equal(one.components, two.components)
    assert torch.equal(one.singular_values, two.singular_values)


def test_leaves_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    feed(ExactSVD(300, 16), [decaying(100, 300)]).result()
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_and_inference_mode_change_nothing() -> None:
    x = decaying(400, 300)
    engine = ExactSVD(300, 8)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        engine.update(x[:200])
    engine.update(x[200:])
    assert torch.equal(engine.result().components, feed(ExactSVD(300, 8), x.split(200)).result().components)
    assert not engine.result().components.requires_grad


def test_sign_is_deterministic() -> None:
    components = feed(ExactSVD(300, 16), [decaying(500, 300)]).result().components
    assert (components.gather(1, components.abs().argmax(1, keepdim=True)) > 0).all()


def test_captured_compares_with_the_optimum() -> None:
    x = decaying(800, 300)
    engine = feed(ExactSVD(300, 8), [x])
    rows = orthonormal_columns(gaussian(300, 8, x.device)).T
    assert engine.captured(rows) == pytest.approx(captured_variance(x, rows), rel=1e-4)
    assert engine.captured(engine.result().components) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dim", [64, 300])
def test_minor_gives_the_least_variance_directions(dim: int) -> None:
    x = decaying(2000, dim, power=0.5)
    sigma, _ = reference(x)
    minor = feed(ExactSVD(dim, 8), [x]).minor(6)
    variance = ((x - x.mean(0)).double() @ minor.components.double().T).square().sum(0)
    assert torch.allclose(variance.sqrt(), sigma.flip(0)[:6], rtol=1e-3)
    assert torch.allclose(minor.singular_values.double(), sigma.flip(0)[:6], rtol=1e-3)
    assert_orthonormal(minor.components)


def test_merge_equals_the_union_whoever_is_empty() -> None:
    x = decaying(900, 256)
    whole = feed(ExactSVD(256, 8), [x]).result()
    left, right = feed(ExactSVD(256, 8), x[:300].split(50)), feed(ExactSVD(256, 8), x[300:].split(50))
    untouched = right.clone().result()
    for engine in (
        left.clone().merge(right),
        right.clone().merge(left),
        ExactSVD(256, 8).merge(left).merge(right),
        left.clone().merge(ExactSVD(256, 8)).merge(right),
    ):
        assert engine.n_samples == 900
        assert torch.allclose(engine.result().singular_values, whole.singular_values, rtol=1e-4)
        assert torch.allclose(engine.result().mean, whole.mean, atol=1e-5)
        assert captured_variance(x, engine.result().components) >= 1 - 1e-6
    assert torch.equal(right.result().components, untouched.components)


def test_merge_stays_precise_when_one_side_is_a_lone_outlier() -> None:
    x = decaying(4000, 64, mean=0)
    outlier = torch.full((1, 64), 400.0)
    sigma = reference(torch.cat([outlier, x]))[0][:8].float()
    for first, second in ((outlier, x), (x, outlier)):
        merged = feed(ExactSVD(64, 8), [first]).merge(feed(ExactSVD(64, 8), [second]))
        assert torch.allclose(merged.result().singular_values, sigma, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    offsets=st.lists(st.floats(-20, 20), min_size=3, max_size=3),
)
def test_merge_is_associative_and_order_free(seed: int, sizes: list[int], offsets: list[float]) -> None:
    parts = [decaying(n, 24, mean=0, seed=seed + i) + o for i, (n, o) in enumerate(zip(sizes, offsets, strict=True))]
    x = torch.cat(parts)

    def engines() -> list[ExactSVD]:
        return [feed(ExactSVD(24, 6), [part]) for part in parts]

    a, b, c = engines()
    first = a.merge(b).merge(c)
    a, b, c = engines()
    second = a.merge(b.merge(c))
    a, b, c = engines()
    third = c.merge(a).merge(b)
    for engine in (first, second, third):
        assert engine.n_samples == len(x)
        if len(x) > 1:
            scale = float(reference(x)[0][0]) + 1e-6
            assert float((engine.result().singular_values - _sigma(x, 6)).abs().max()) <= 2e-3 * scale
            assert engine.result().total_variance == pytest.approx(float(_sigma(x, 24).square().sum()), rel=1e-4)


def _sigma(x: torch.Tensor, k: int) -> torch.Tensor:
    sigma = reference(x)[0][:k].float()
    return torch.cat([sigma, torch.zeros(k - len(sigma))])


def test_state_bytes_are_known_before_anything_is_allocated() -> None:
    engine = ExactSVD(512, 16)
    assert engine.state_bytes == ExactSVD.estimate_bytes(512, 16) >= 4 * 512**2
    feed(engine, [decaying(40, 512)]).result()
    assert 4 * 512**2 <= held_bytes(engine, 512) <= engine.state_bytes


def test_errors_name_the_expectation_and_the_value() -> None:
    with pytest.raises(ValueError, match="k must be a whole number of at least 1 and of at most 64, got 65"):
        ExactSVD(64, 65)
    with pytest.raises(ValueError, match="at least 1 and of at most 64, got 0"):
        ExactSVD(64, 0)
    engine = ExactSVD(64, 4)
    with pytest.raises(RuntimeError, match="no tokens"):
        engine.result()
    with pytest.raises(RuntimeError, match="no tokens"):
        engine.captured(torch.eye(64)[:4])
    with pytest.raises(RuntimeError, match="no tokens"):
        engine.minor(2)
    with pytest.raises(ValueError, match=r"\(\.\.\., 64\), got \(3, 65\)"):
        engine.update(torch.zeros(3, 65))
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        engine.update(torch.zeros(3, 64), torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match="boolean"):
        engine.update(torch.zeros(3, 64), torch.ones(3))
    with pytest.raises(TypeError, match="floating-point"):
        engine.update(torch.zeros(3, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="equal"):
        engine.merge(ExactSVD(64, 5))
    with pytest.raises(ValueError, match="at most 64, got 99"):
        feed(ExactSVD(64, 4), [torch.zeros(3, 64)]).minor(99)


def test_rank_deficient_columns_get_an_orthonormal_basis() -> None:
    z = gaussian(50, 3, torch.device("cpu"))
    basis = orthonormal_columns(torch.cat([z, z[:, :1], torch.zeros(50, 2)], dim=1))
    assert_orthonormal(basis.T)


def test_top_eigenpairs_of_a_matrix_narrower_than_the_oversampling() -> None:
    c = torch.diag(torch.arange(1.0, 11.0))
    values, vectors = top_eigenpairs(lambda q: c @ q, 10, 10, c.device)
    assert torch.allclose(values, torch.arange(10.0, 0, -1, dtype=torch.float64), rtol=1e-5)
    assert_orthonormal(vectors.T)
