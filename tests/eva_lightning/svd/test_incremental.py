"""IncrementalSVD (Algorithm 2) against dense SVD, scikit-learn's IncrementalPCA, and difficult streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import IncrementalPCA

from eva_lightning.svd import IncrementalSVD
from tests.svd_helpers import assert_orthonormal, captured_variance, decaying, digits, feed, reference


def test_equals_scikit_learns_incremental_pca_on_digits() -> None:
    x, _ = digits()
    pca = IncrementalPCA(n_components=16, batch_size=100).fit(x[:1700].double().numpy())
    engine = feed(IncrementalSVD(64, 16), x[:1700].split(100))
    result = engine.result()
    assert torch.allclose(result.singular_values.double(), torch.from_numpy(pca.singular_values_), rtol=1e-4)
    ratio = torch.from_numpy(pca.explained_variance_ratio_)
    assert torch.allclose(result.explained_variance_ratio.double(), ratio, rtol=1e-4)
    assert torch.allclose(result.mean.double(), torch.from_numpy(pca.mean_), atol=1e-4)
    cosine = (result.components.double() * torch.from_numpy(pca.components_)).sum(1).abs()
    assert cosine.min() > 0.9999


@pytest.mark.parametrize(("dim", "batch"), [(64, 40), (200, 170), (640, 300)])
def test_captures_realistic_spectra(dim: int, batch: int) -> None:
    x, k = decaying(1500, dim), 16
    sigma, _ = reference(x)
    result = feed(IncrementalSVD(dim, k), x.split(batch)).result()
    assert captured_variance(x, result.components) >= 0.995
    assert torch.allclose(result.singular_values[:4].double(), sigma[:4], rtol=0.02)
    assert result.total_variance == pytest.approx(float(sigma.square().sum()), rel=1e-5)
    assert torch.allclose(result.mean.double(), x.double().mean(0), atol=1e-4)
    assert (result.components.dtype, result.n_samples) == (torch.float32, 1500)
    assert_orthonormal(result.components)


def test_one_batch_is_an_exact_truncated_svd() -> None:
    for n, dim in ((300, 64), (900, 400)):
        x = decaying(n, dim)
        result = feed(IncrementalSVD(dim, 16), [x]).result()
        assert captured_variance(x, result.components) >= 1 - 1e-6
        assert torch.allclose(result.singular_values.double(), reference(x)[0][:16], rtol=1e-4)


def test_is_exact_when_k_components_hold_all_the_variance() -> None:
    basis = torch.linalg.qr(torch.randn(96, 6, generator=torch.Generator().manual_seed(1))).Q.T
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(2)) @ basis + 4.0
    result = feed(IncrementalSVD(96, 8), x.split(33)).result()
    assert captured_variance(x, result.components) >= 1 - 1e-6
    assert torch.allclose(result.singular_values[:6].double(), reference(x)[0][:6], rtol=1e-4)


def test_is_nearly_invariant_to_batch_size_and_order() -> None:
    x = decaying(1200, 256)
    shuffled = x[torch.randperm(1200, generator=torch.Generator().manual_seed(0))]
    for batches in ([x], x.split(5), x.split(64), x.split(400), shuffled.split(64), x.flip(0).split(64)):
        assert captured_variance(x, feed(IncrementalSVD(256, 16), batches).result().components) >= 0.995


def test_small_batches_accumulate_and_none_is_lost() -> None:
    x = decaying(61, 64)
    engine = IncrementalSVD(64, 16)
    for row in x:
        engine.update(row)
    assert engine.n_samples == engine.result().n_samples == 61
    assert engine.result().total_variance == pytest.approx(float(reference(x)[0].square().sum()), rel=1e-5)
    assert captured_variance(x, engine.result().components) >= 0.98


def test_looking_at_the_result_does_not_change_the_stream() -> None:
    x = decaying(200, 64)
    watched, unwatched = IncrementalSVD(64, 8), IncrementalSVD(64, 8)
    for batch in x.split(3):
        watched.update(batch)
        watched.result()
        watched.captured(torch.eye(64)[:8])
        unwatched.update(batch)
    assert torch.equal(watched.result().components, unwatched.result().components)


def test_waiting_tokens_are_copies() -> None:
    x = torch.ones(2, 8)
    engine = IncrementalSVD(8, 4)
    engine.update(x)
    x.zero_()
    assert torch.equal(engine.result().mean, torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_takes_any_dtype_shape_strides_and_mask(dtype: torch.dtype) -> None:
    x = decaying(400, 64).reshape(8, 50, 64).to(dtype)
    mask = torch.rand(8, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    padded = x.clone()
    padded[~mask] = float("nan")
    engine = IncrementalSVD(64, 8)
    engine.update(padded.transpose(0, 1), mask.T)
    engine.update(padded, torch.zeros(8, 50, dtype=torch.bool))
    assert engine.n_samples == int(mask.sum())
    assert captured_variance(x[mask], engine.result().components) >= 0.9999


@pytest.mark.parametrize("value", [0.0, 7.3])
def test_constant_inputs_have_no_variance(value: float) -> None:
    engine = feed(IncrementalSVD(64, 8), [torch.full((50, 64), value), torch.full((9, 64), value)])
    result = engine.result()
    assert result.total_variance == 0.0
    assert result.singular_values.eq(0).all()
    assert result.explained_variance_ratio.eq(0).all()
    assert engine.captured(torch.eye(64)[:8]) == 1.0
    assert_orthonormal(result.components)


def test_fewer_tokens_than_components() -> None:
    x = decaying(5, 300)
    result = feed(IncrementalSVD(300, 16), [x[:2], x[2:]]).result()
    assert result.components.shape == (16, 300)
    assert result.singular_values[4:].eq(0).all()
    assert torch.allclose(result.singular_values[:4].double(), reference(x)[0][:4], rtol=1e-4)
    assert_orthonormal(result.components)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_refused_before_they_do_harm(bad: float) -> None:
    x = decaying(100, 64)
    engine = feed(IncrementalSVD(64, 4), [x])
    before = engine.result()
    broken = x.clone()
    broken[3, 5] = bad
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        engine.update(broken)
    with pytest.raises(FloatingPointError, match="NaN or Inf"):
        engine.update(broken[3:5])
    assert engine.n_samples == 100
    assert torch.equal(engine.result().components, before.components)


def test_repeats_are_identical_and_signs_stable() -> None:
    x = decaying(900, 300)
    one, two = (feed(IncrementalSVD(300, 16), x.split(300)).result() for _ in range(2))
    assert torch.equal(one.components, two.components)
    assert (one.components.gather(1, one.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_merge_captures_the_union_whoever_is_empty() -> None:
    x = decaying(900, 256)
    left, right = feed(IncrementalSVD(256, 16), x[:300].split(50)), feed(IncrementalSVD(256, 16), x[300:].split(50))
    for engine in (
        left.clone().merge(right),
        right.clone().merge(left),
        IncrementalSVD(256, 16).merge(left).merge(right),
        left.clone().merge(IncrementalSVD(256, 16)).merge(right),
    ):
        assert engine.n_samples == 900
        assert captured_variance(x, engine.result().components) >= 0.995
        assert engine.result().total_variance == pytest.approx(float(reference(x)[0].square().sum()), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(0, 20), min_size=3, max_size=3),
    offsets=st.lists(st.floats(-20, 20), min_size=3, max_size=3),
)
def test_merge_is_associative_and_order_free_within_k_dimensions(
    seed: int, sizes: list[int], offsets: list[float]
) -> None:
    basis = decaying(4, 24, seed=seed)
    parts = [
        decaying(n, 4, mean=0, seed=seed + i) @ basis + o for i, (n, o) in enumerate(zip(sizes, offsets, strict=True))
    ]
    x = torch.cat(parts)

    def engines() -> list[IncrementalSVD]:
        return [feed(IncrementalSVD(24, 7), part.split(3)) for part in parts]

    a, b, c = engines()
    first = a.merge(b).merge(c)
    a, b, c = engines()
    second = a.merge(b.merge(c))
    a, b, c = engines()
    third = c.merge(a).merge(b)
    for engine in (first, second, third):
        assert engine.n_samples == len(x)
        if len(x) > 1:
            sigma = reference(x)[0][:7].float()
            found = engine.result().singular_values[: len(sigma)]
            assert float((found - sigma).abs().max()) <= 2e-3 * float(sigma[0]) + 1e-5


def test_errors_name_the_expectation_and_the_value() -> None:
    with pytest.raises(ValueError, match="at most 64, got 65"):
        IncrementalSVD(64, 65)
    engine = IncrementalSVD(64, 4)
    with pytest.raises(RuntimeError, match="no tokens"):
        engine.result()
    with pytest.raises(ValueError, match=r"\(\.\.\., 64\)"):
        engine.update(torch.zeros(3, 65))
    with pytest.raises(ValueError, match="equal"):
        engine.merge(IncrementalSVD(64, 5))
