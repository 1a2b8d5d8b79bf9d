"""A from an SVD result: EVA and the ablations."""

from __future__ import annotations

import math

import pytest
import torch

from eva_lightning.initialization import INITS, initial_a, random_rotation, uniform_orthonormal
from eva_lightning.svd import ExactSVD, SVDResult
from tests.svd_helpers import assert_orthonormal, decaying


@pytest.fixture(scope="module")
def result() -> SVDResult:
    engine = ExactSVD(96, 12)
    engine.update(decaying(500, 96))
    return engine.result()


def build(init: str, result: SVDResult, rank: int = 8, seed: int = 0) -> torch.Tensor:
    return initial_a(
        init,
        result.components,
        result.singular_values,
        result.explained_variance_ratio,
        rank,
        torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rank", [0, 1, 8, 12])
def test_shape_dtype_and_no_shared_storage(init: str, rank: int, result: SVDResult) -> None:
    before = result.components.clone()
    a = build(init, result, rank)
    assert (a.shape, a.dtype) == ((rank, 96), torch.float32)
    assert a.isfinite().all()
    a.add_(1.0)
    assert torch.equal(result.components, before)


@pytest.mark.parametrize("init", INITS)
def test_same_seed_same_matrix_and_no_global_randomness(init: str, result: SVDResult) -> None:
    before = torch.get_rng_state()
    assert torch.equal(build(init, result, seed=3), build(init, result, seed=3))
    values = (result.components, result.singular_values, result.explained_variance_ratio, 8)
    assert torch.equal(initial_a(init, *values), initial_a(init, *values))
    assert torch.equal(before, torch.get_rng_state())


def test_eva_and_minor_are_the_components(result: SVDResult) -> None:
    assert torch.equal(build("eva", result), result.components[:8])
    assert torch.equal(build("minor", result), result.components[:8])


def test_whiten_keeps_directions_and_scales_by_the_root_of_the_ratio(result: SVDResult) -> None:
    a = build("whiten", result)
    norms = torch.linalg.vector_norm(a, dim=1)
    assert torch.allclose(norms, result.explained_variance_ratio[:8] ** -0.5, rtol=1e-4)
    assert torch.allclose(a / norms[:, None], result.components[:8], atol=1e-5)


def test_lora_norm_keeps_directions_at_the_mean_row_length_of_loras_default(result: SVDResult) -> None:
    a, v = build("lora-norm", result).double(), result.components[:8].double()
    drawn = torch.empty(20000, 96, dtype=torch.float64)
    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    root_mean_square = drawn.square().sum(1).mean().sqrt()
    assert root_mean_square == pytest.approx(0.57735, rel=2e-3)
    assert torch.allclose(torch.linalg.vector_norm(a, dim=1), root_mean_square, rtol=2e-3)
    assert torch.allclose(a / torch.linalg.vector_norm(a, dim=1)[:, None], v, atol=1e-6)


def test_orthonormal_columns_are_uniform_and_those_of_gram_schmidt() -> None:
    normal = torch.randn(4000, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([uniform_orthonormal(matrix) for matrix in normal])
    first = normal[:, :, 0] / torch.linalg.vector_norm(normal[:, :, 0], dim=1, keepdim=True)
    rest = normal[:, :, 1] - (first * normal[:, :, 1]).sum(1, keepdim=True) * first
    second = rest / torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    assert torch.allclose(drawn, torch.stack([first, second], dim=2), atol=1e-10)
    # columns of a uniform frame have mean 0 and second moment I / 5
    moment = torch.einsum("bik,bjk->ij", drawn, drawn) / (2 * 4000)
    assert (moment - torch.eye(5, dtype=torch.float64) / 5).abs().max() < 0.01
    assert drawn.mean(0).abs().max() < 4 * math.sqrt(1 / 5 / 4000)


def test_whiten_does_not_blow_up_without_variance() -> None:
    engine = ExactSVD(16, 4)
    engine.update(torch.zeros(5, 16))
    result = engine.result()
    assert torch.equal(build("whiten", result, 4), result.components)


def test_rotate_keeps_norms_and_span_and_changes_directions(result: SVDResult) -> None:
    a, v = build("rotate", result), result.components[:8]
    assert_orthonormal(a)
    assert torch.allclose(a @ v.T @ v, a, atol=1e-5)
    assert (a * v).sum(1).abs().max() < 0.95
    assert not torch.allclose(a, build("rotate", result, seed=1), atol=0.1)


def test_rotations_are_uniform_over_the_orthogonal_group() -> None:
    generator = torch.Generator().manual_seed(0)
    rotations = torch.stack([random_rotation(3, generator) for _ in range(2000)])
    identity = torch.eye(3).expand(2000, 3, 3)
    assert torch.allclose(rotations @ rotations.transpose(1, 2), identity, atol=1e-5)
    # Every entry of a uniform 3 x 3 orthogonal matrix has mean 0 and variance 1/3.
    assert rotations.mean(0).abs().max() < 4 * math.sqrt(1 / 3 / 2000)
    assert (rotations.square().mean(0) - 1 / 3).abs().max() < 0.03
    assert 0.45 < float((torch.linalg.det(rotations) > 0).float().mean()) < 0.55


def test_permute_shuffles_each_column_on_its_own(result: SVDResult) -> None:
    a, v = build("permute", result), result.components[:8]
    assert torch.equal(a.sort(0).values, v.sort(0).values)
    assert torch.linalg.matrix_norm(a) == pytest.approx(float(torch.linalg.matrix_norm(v)), rel=1e-5)
    assert (a @ v.T).abs().max() < 0.9
    assert not torch.allclose(torch.linalg.vector_norm(a, dim=1), torch.ones(8), atol=1e-3)


def test_redistribute_draws_loras_default(result: SVDResult) -> None:
    """The same numbers as torch's Linear and PEFT's LoRA: kaiming_uniform_ with a = sqrt(5)."""
    expected = torch.empty(8, 96)
    torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(build("redistribute", result), expected)


def test_errors(result: SVDResult) -> None:
    with pytest.raises(ValueError, match="unknown init 'evva': did you mean eva"):
        build("evva", result)
    with pytest.raises(ValueError, match="12 components held, got 13"):
        build("eva", result, rank=13)
    with pytest.raises(ValueError, match="12, 11 and 12"):
        initial_a("eva", result.components, result.singular_values[:11], result.explained_variance_ratio, 2)
