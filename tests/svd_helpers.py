"""Data and the reference the SVD engines are measured against: a dense fp64 SVD of the stacked, centred tokens."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eva_lightning.svd import StreamingSVD


def decaying(n: int, dim: int, power: float = 1.0, mean: float = 3.0, seed: int = 0) -> Tensor:
    """Tokens whose covariance has eigenvalues j**(-2 * power) in a random basis, shape (n, dim)."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    scale = torch.arange(1, dim + 1) ** -power
    return torch.randn(n, dim, generator=generator) * scale @ basis + mean * torch.randn(dim, generator=generator)


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's scanned digits: (1797, 64) fp32 and their labels."""
    from sklearn.datasets import load_digits  # not at the top: spawned processes import this file and need none of it

    data = load_digits()
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target)


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """All singular values and right-singular vectors of the centred tokens, in fp64."""
    x = x.double()
    _, sigma, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    return sigma, v


def captured_variance(x: Tensor, components: Tensor) -> float:
    """Variance captured by the rows of `components`, over the optimum for as many rows."""
    centred = x.double() - x.double().mean(0)
    optimum = reference(x)[0][: len(components)].square().sum()
    return float((centred @ components.double().T).square().sum() / optimum)


def feed(engine: StreamingSVD, batches: Iterable[Tensor]) -> StreamingSVD:
    """Update `engine` with all batches and return it."""
    for batch in batches:
        engine.update(batch)
    return engine


def held_tensors(value: object) -> list[Tensor]:
    """All tensors that an engine holds in its attributes, each once."""
    found: dict[tuple[int, torch.Size], Tensor] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found[item.data_ptr(), item.shape] = item
        elif isinstance(item, (list, tuple)):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())
    return list(found.values())


def held_bytes(value: object, least: int) -> int:
    """Bytes of :func:`held_tensors` of at least `least` numbers."""
    return sum(tensor.nbytes for tensor in held_tensors(value) if tensor.numel() >= least)


def assert_orthonormal(rows: Tensor) -> None:
    """Rows are orthonormal to fp32 rounding."""
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=2e-6)
