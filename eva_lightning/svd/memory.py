"""Engines by name, and which engine each layer gets within a memory budget."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch

from eva_lightning.errors import InputError, check_choice, check_number
from eva_lightning.files import format_bytes
from eva_lightning.svd.engine import StreamingSVD
from eva_lightning.svd.exact import ExactSVD
from eva_lightning.svd.incremental import IncrementalSVD
from eva_lightning.svd.sketch import SketchSVD

ENGINES: dict[str, type[StreamingSVD]] = {"exact": ExactSVD, "incremental": IncrementalSVD, "sketch": SketchSVD}
# Narrower than this, a sketch takes as long as the covariance.
_SKETCH_MIN_DIM = 512


def make_engine(name: str, dim: int, k: int, device: torch.device | str | None = None) -> StreamingSVD:
    """Build the engine called `name`.

    Args:
        name: "exact", "incremental" or "sketch".
        dim: Width of the inputs.
        k: Components wanted, 1 <= k <= dim.
        device: Where the state lives; None: where the first batch is.

    Raises:
        InputError: Unknown name, or k outside [1, dim].
    """
    return _engine_class(name)(dim, k, device)


def estimate_bytes(name: str, dim: int, k: int) -> int:
    """Bytes of state of the engine called `name`, before it is allocated.

    Raises:
        InputError: Unknown name.
    """
    return _engine_class(name).estimate_bytes(dim, k)


def message_bytes(name: str, dim: int, k: int) -> int:
    """Bytes every rank contributes when ranks are united: per subspace iteration for "exact", in all for the others.

    Raises:
        InputError: Unknown name.
    """
    return _engine_class(name).message_bytes(dim, k)


def total_bytes(names: Mapping[str, str], dims: Mapping[str, int], k: int) -> int:
    """Bytes of all states together, before any is allocated.

    Args:
        names: Engine per layer.
        dims: Input width per layer.
        k: Components wanted; layers narrower than that keep all.
    """
    return sum(estimate_bytes(name, dims[layer], min(k, dims[layer])) for layer, name in names.items())


def choose_engines(
    dims: Mapping[str, int],
    k: int,
    engine: str,
    budget_bytes: float,
    *,
    offload: bool = False,
    device: torch.device | str = "cpu",
    thrifty: bool = True,
) -> dict[str, str]:
    """Engine name for every layer.

    "auto" gives the exact engine to the narrowest layers first, for as long as all states together fit the budget, and
    the sketch to the rest. On the CPU the sketch also goes to layers more than twice as wide as the median one: the
    input of the second MLP layer, four times as wide as the others, makes 84% of the cost of a transformer's
    covariances. (On a GPU large products are cheaper than the many small steps of a sketch.)

    Args:
        dims: Input width per layer; list layers that share their input once.
        k: Components wanted; layers narrower than that keep all.
        engine: "auto", or an engine's name for all layers whatever the budget.
        budget_bytes: Memory for all states together.
        offload: What does not fit will be kept on the CPU (:func:`place_engines`), so "auto" does not raise.
        device: Where the layers run.
        thrifty: Save time on the CPU too, as above; otherwise only the budget takes a layer from the exact engine.

    Raises:
        InputError: Unknown engine, a negative budget, or one too small for even the sketches ("auto" only).
    """
    if engine != "auto":
        _engine_class(engine)
        return dict.fromkeys(dims, engine)
    check_number("memory_budget", budget_bytes, at_least=0)
    chosen = {layer: _smallest(dim, k) for layer, dim in dims.items()}
    used = total_bytes(chosen, dims, k)
    if used > budget_bytes and not offload:
        raise InputError(
            f"EVA needs at least {format_bytes(used)} for {len(dims)} layers with k={k}, but the memory budget is "
            f"{format_bytes(budget_bytes)}: raise the budget, adapt fewer layers, or lower r or rho"
        )
    limit = float("inf")
    if dims and thrifty and torch.device(device).type == "cpu":
        limit = max(2 * statistics.median(dims.values()), _SKETCH_MIN_DIM - 1)
    for layer, dim in sorted(dims.items(), key=lambda item: item[1]):
        extra = total_bytes({layer: "exact"}, dims, k) - total_bytes({layer: chosen[layer]}, dims, k)
        if dim <= limit and used + extra <= budget_bytes:
            chosen[layer] = "exact"
            used += extra
    return chosen


def place_engines(
    names: Mapping[str, str],
    dims: Mapping[str, int],
    k: int,
    budget_bytes: float,
    devices: Mapping[str, torch.device],
) -> dict[str, torch.device]:
    """Where each layer's state lives: on the layer's device while it fits the budget, smallest first, else on the CPU.

    Tokens of a layer whose state is on the CPU travel there in every update.

    Args:
        names: Engine per layer.
        dims: Input width per layer.
        k: Components wanted.
        budget_bytes: Memory for all states on devices other than the CPU.
        devices: Device of each layer.
    """
    placed, used = dict(devices), 0
    size = {layer: total_bytes({layer: name}, dims, k) for layer, name in names.items()}
    for layer in sorted(size, key=lambda layer: size[layer]):
        if used + size[layer] <= budget_bytes:
            used += size[layer]
        else:
            placed[layer] = torch.device("cpu")
    return placed


def _smallest(dim: int, k: int) -> str:
    kept = min(k, dim)
    return min(("exact", "sketch"), key=lambda name: estimate_bytes(name, dim, kept))


def _engine_class(name: str) -> type[StreamingSVD]:
    check_choice("engine", name, ENGINES)
    return ENGINES[name]
