"""Engines by name, and which engine each layer gets within a memory budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eva_lightning.svd.exact import ExactSVD
from eva_lightning.svd.incremental import IncrementalSVD
from eva_lightning.svd.result import StreamingSVD

ENGINES: dict[str, type[ExactSVD] | type[IncrementalSVD]] = {"exact": ExactSVD, "incremental": IncrementalSVD}


def make_engine(name: str, dim: int, k: int, device: torch.device | str | None = None) -> StreamingSVD:
    """Build the engine called `name`.

    Args:
        name: "exact" or "incremental".
        dim: Width of the inputs.
        k: Components wanted, 1 <= k <= dim.
        device: Where the state lives; None: where the first batch is.

    Raises:
        ValueError: Unknown name, or k outside [1, dim].
    """
    return _engine_class(name)(dim, k, device)


def estimate_bytes(name: str, dim: int, k: int) -> int:
    """Bytes of state of the engine called `name`, before it is allocated.

    Raises:
        ValueError: Unknown name.
    """
    return _engine_class(name).estimate_bytes(dim, k)


def choose_engines(dims: Mapping[str, int], k: int, engine: str, budget_bytes: float) -> dict[str, str]:
    """Engine name for every layer.

    "auto" gives the exact engine to the narrowest layers first, for as long as all states together fit the budget,
    and the incremental engine to the rest: narrow layers cost little memory each, so this makes most layers exact.

    Args:
        dims: Input width per layer; list layers that share their input once.
        k: Components wanted.
        engine: "auto", or an engine's name for all layers whatever the budget.
        budget_bytes: Memory for all states together.

    Raises:
        ValueError: Unknown engine, or a budget that is negative.
    """
    if engine != "auto":
        _engine_class(engine)
        return dict.fromkeys(dims, engine)
    if not budget_bytes >= 0:
        raise ValueError(f"The memory budget must be at least 0 bytes, got {budget_bytes}.")
    chosen = dict.fromkeys(dims, "incremental")
    used = sum(estimate_bytes("incremental", dim, min(k, dim)) for dim in dims.values())
    for layer, dim in sorted(dims.items(), key=lambda item: item[1]):
        kept = min(k, dim)
        extra = estimate_bytes("exact", dim, kept) - estimate_bytes("incremental", dim, kept)
        if used + max(extra, 0) <= budget_bytes or extra <= 0:
            chosen[layer] = "exact"
            used += extra
    return chosen


def _engine_class(name: str) -> type[ExactSVD] | type[IncrementalSVD]:
    if name not in ENGINES:
        raise ValueError(f'Unknown SVD engine "{name}": expected "auto", "exact" or "incremental".')
    return ENGINES[name]
