"""Analyses of the EVA paper as functions: convergence, batch order and size, ranks over rho, distances of adapters.

They take any model and minibatches, or what runs left behind; :mod:`eva_lightning.plots` draws what they return, and
``python -m experiments.analysis`` makes all of them on a small model.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.adapters import find_adapters
from eva_lightning.batch_forward import ForwardFn, MaskFn, no_grad_forward
from eva_lightning.capture import InputCapture
from eva_lightning.errors import InputError, check_number
from eva_lightning.layer_inputs import inputs_of
from eva_lightning.side_effects import observing
from eva_lightning.state import EVAState
from eva_lightning.svd import StreamingSVD, make_engine
from eva_lightning.token_masks import TokenMasks

RHOS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.5, 3.0)
"""The values the paper searches over (section G)."""

Components = Mapping[str, Tensor]
"""Layer name -> orthonormal rows, shape ``(k, dim)``, descending in variance."""


@dataclass(frozen=True)
class ConvergencePoint:
    """How far the decompositions have come after some minibatches.

    Attributes:
        n_batches: minibatches seen.
        n_samples: samples (images, sequences) in them.
        seconds: wall time since the start, forward passes included.
        converged: components, over all layers, that moved less than the threshold in the last update.
        total: all components.
    """

    n_batches: int
    n_samples: int
    seconds: float
    converged: int
    total: int


def convergence_curve(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    k: int,
    tau: float = 0.99,
    engine: str = "incremental",
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
) -> list[ConvergencePoint]:
    """Number of converged components over minibatches (paper Figure 11).

    A component has converged when ``|cos|`` between its directions before and after the last update is at least tau
    (paper section 3.2); components without variance count as converged. The stream runs to the end of `batches`.

    Args:
        model: what ``forward_fn`` runs.
        batches: minibatches.
        layers: name -> the layer whose inputs to decompose.
        k: components per layer, at most its width.
        tau: threshold in (0, 1].
        engine: "incremental" (the paper's Algorithm 2) or "exact".
        forward_fn: ``forward_fn(model, batch)``; default :func:`eva_lightning.batch_forward.run_forward`.
        mask_fn: ``mask_fn(batch)``: True for the tokens that count.

    Raises:
        InputError: k or tau out of range, unknown engine, or no minibatch.
    """
    check_number("tau", tau, above=0, at_most=1)
    points: list[ConvergencePoint] = []
    previous: dict[str, Tensor] = {}
    n_samples, started = 0, time.perf_counter()
    for batch, engines in _stream(model, batches, layers, k, engine, forward_fn, mask_fn):
        n_samples += _n_samples(batch)
        converged = total = 0
        for name, svd in engines.items():
            result = svd.result()
            total += len(result.components)
            if name in previous:
                cosines = component_cosines(previous[name], result.components)
                converged += int(((cosines >= tau) | (result.singular_values.cpu() == 0)).sum())
            previous[name] = result.components.cpu()
        points.append(ConvergencePoint(len(points) + 1, n_samples, time.perf_counter() - started, converged, total))
    if not points:
        raise InputError("convergence_curve needs at least one minibatch, got none")
    return points


def collect_components(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    k: int,
    engine: str = "incremental",
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
) -> dict[str, Tensor]:
    """Top k right-singular vectors ``(k, dim)`` of every layer's inputs over all of `batches`, on the CPU.

    Raises:
        InputError: k out of range, unknown engine, or no minibatch.
    """
    engines: dict[str, StreamingSVD] = {}
    for _, seen in _stream(model, batches, layers, k, engine, forward_fn, mask_fn):
        engines = seen
    if not engines:
        raise InputError("collect_components needs at least one minibatch, got none")
    return {name: svd.result().components.cpu() for name, svd in engines.items()}


def component_cosines(a: Tensor, b: Tensor) -> Tensor:
    """``|cos|`` between matching rows of two sets of unit vectors, shape ``(k, dim)`` each -> ``(k,)``.

    The sign of a singular vector is arbitrary, so it does not count.
    """
    _same_shape("components", a, b)
    return (a.cpu().double() * b.cpu().double()).sum(dim=1).abs().clamp_max(1.0)


def subspace_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Overlap of the spans of the first j rows for j = 1 .. k: ``|A_j B_j^T|_F^2 / j``, in [0, 1], shape ``(k,)``.

    Components of nearly equal variance rotate among each other from one stream to the next; the space they span, which
    is all that a captured variance depends on, need not change. This is 1 where the spans agree.
    """
    _same_shape("components", a, b)
    products = (a.cpu().double() @ b.cpu().double().T).square()
    corners = products.cumsum(0).cumsum(1).diagonal()
    return (corners / torch.arange(1, len(products) + 1)).clamp_max(1.0)


@dataclass(frozen=True)
class Similarity:
    """Agreement of several runs, component by component, averaged over layers and pairs of runs.

    Attributes:
        cosine: mean ``|cos|`` of the j-th components, shape ``(k,)``.
        overlap: mean overlap of the spans of the first j components, shape ``(k,)``.
    """

    cosine: Tensor
    overlap: Tensor


def component_similarity(runs: Sequence[Components]) -> Similarity:
    """How alike the components of streams in different orders are (paper Figure 12, left).

    Layers with fewer than k components take part in the averages of those they have.

    Raises:
        InputError: fewer than two runs, or runs of different layers.
    """
    if len(runs) < 2:
        raise InputError(f"component_similarity compares at least two runs, got {len(runs)}")
    _same_layers(runs)
    k = max(len(v) for v in runs[0].values())
    cosine, overlap = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    count = torch.zeros(k, dtype=torch.float64)
    for a, b in itertools.combinations(runs, 2):
        for name, rows in a.items():
            cosine[: len(rows)] += component_cosines(rows, b[name])
            overlap[: len(rows)] += subspace_overlap(rows, b[name])
            count[: len(rows)] += 1
    return Similarity(cosine / count, overlap / count)


def similarity_matrix(runs: Mapping[Any, Components]) -> Tensor:
    """Mean ``|cos|`` of matching components between every two runs, shape ``(runs, runs)`` (paper Figure 5, right).

    Averaged over components, then layers. The diagonal is 1.

    Raises:
        InputError: no run, or runs of different layers.
    """
    if not runs:
        raise InputError("similarity_matrix needs at least one run, got none")
    values = list(runs.values())
    _same_layers(values)
    matrix = torch.eye(len(values), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(values)), 2):
        cosines = [component_cosines(rows, values[j][name]).mean() for name, rows in values[i].items()]
        matrix[i, j] = matrix[j, i] = torch.stack(cosines).mean()
    return matrix


def rank_maps(
    state: EVAState, r: int, rhos: Sequence[float] = RHOS, metric: str = "ratio"
) -> dict[float, dict[str, int]]:
    """Ranks of every layer for each rho (paper Figure 13), from one state that holds ``r * max(rhos)`` components.

    Raises:
        InputError: the state holds too few components, or r, rho or metric is out of range.
    """
    return {rho: state.redistribute(r, rho, metric) for rho in rhos}


def rank_deltas(maps: Mapping[float, Mapping[str, int]]) -> dict[float, dict[str, int]]:
    """Change of every layer's rank from the next smaller rho to each rho (paper Figure 14).

    Raises:
        InputError: fewer than two rhos, or maps of different layers.
    """
    if len(maps) < 2:
        raise InputError(f"rank_deltas needs the ranks for at least two rhos, got {len(maps)}")
    _same_layers(list(maps.values()))
    ordered = sorted(maps)
    return {
        rho: {name: rank - maps[before][name] for name, rank in maps[rho].items()}
        for before, rho in itertools.pairwise(ordered)
    }


@dataclass(frozen=True)
class Distance:
    """Distance between two adapters' A matrices: spectral norm of the difference, mean cosine of matching rows."""

    spectral_norm: float
    cosine: float


def adapter_distance(a: Tensor, b: Tensor) -> Distance:
    """Distance between two A matrices of shape ``(r, dim)`` (paper Tables 5 and 6).

    A, because B is zero before training. Matching rows are compared with their sign, which training does not lose.
    A move of the same length turns short rows further than long ones: rows start at length 1 with EVA and at about
    0.58 with LoRA, so part of EVA's higher cosine to its start is due to that alone.

    Raises:
        InputError: the shapes differ.
    """
    _same_shape("A matrices", a, b)
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    norm = float(torch.linalg.matrix_norm(a - b, ord=2))
    return Distance(norm, float(torch.nn.functional.cosine_similarity(a, b, dim=1).mean()))


def adapter_distances(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Distance]:
    """:func:`adapter_distance` of every layer: initial against final adapters (Table 6), or of two methods (Table 5).

    Layers whose ranks differ (Table 5 with redistributed ranks) are compared in the rows that both have.

    Raises:
        InputError: no layer in common, or other widths.
    """
    common = [name for name in a if name in b]
    if not common:
        raise InputError("adapter_distances: the two sets of adapters have no layer in common")
    distances = {}
    for name in common:
        rows = min(len(a[name]), len(b[name]))
        distances[name] = adapter_distance(a[name][:rows], b[name][:rows])
    return distances


def adapter_matrices(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all A matrices, ``(r, dim)``, fp32 on the CPU, by layer name: take them before and after training."""
    return {name: layer.a.detach().float().cpu().clone() for name, layer in find_adapters(module).items()}


def _stream(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, nn.Module],
    k: int,
    engine: str,
    forward_fn: ForwardFn | None,
    mask_fn: MaskFn | None,
) -> Iterator[tuple[Any, dict[str, StreamingSVD]]]:
    """After every minibatch, it and the engines of all layers that have run; the model is as before at the end."""
    check_number("k", k, at_least=1, whole=True)
    inputs = {name: inputs_of(layer) for name, layer in layers.items()}
    engines = {name: make_engine(engine, x.width, min(k, x.width)) for name, x in inputs.items()}
    # shared inputs are decomposed once per layer: slower, and no layer's curve can depend on another's
    capture = InputCapture(inputs, engines, never_share=set(layers))
    masks = TokenMasks(mask_fn)
    with capture.watching(), observing(model):
        for batch in batches:
            capture.begin(masks.begin(batch))
            no_grad_forward(forward_fn, model, batch)
            capture.end()
            masks.end()
            yield batch, {name: svd for name, svd in engines.items() if svd.n_samples > 0}


def _n_samples(batch: Any) -> int:
    while isinstance(batch, (list, tuple, Mapping)) and batch:
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    return len(batch)


def _same_layers(runs: Sequence[Mapping[str, Any]]) -> None:
    for run in runs[1:]:
        if set(run) != set(runs[0]):
            differ = sorted(set(run) ^ set(runs[0]))
            raise InputError(f"runs to compare must hold the same layers; {differ[0]!r} is in only some of them")


def _same_shape(what: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(f"{what} must have equal shapes to be compared, got {tuple(a.shape)} and {tuple(b.shape)}")
