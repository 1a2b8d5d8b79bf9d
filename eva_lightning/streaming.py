"""Drive minibatches through a model and its layers' streaming SVDs until they have converged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from eva_lightning.batch_forward import ForwardFn, MaskFn, no_grad_forward
from eva_lightning.capture import InputCapture, SharingChanged
from eva_lightning.engine_plan import Allocation
from eva_lightning.errors import InputError
from eva_lightning.layer_inputs import LayerInputs, inputs_of
from eva_lightning.side_effects import observing
from eva_lightning.state import EVAState
from eva_lightning.svd import ExactSVD, StreamingSVD, SVDResult, solve
from eva_lightning.svd.stopping import StoppingRule, make_stopping_rule
from eva_lightning.token_subsampling import TokenChoice, TokensPerSample


class Progress(Protocol):
    """Told after every minibatch how many there were and what share of the layers has converged."""

    def __call__(self, n_batches: int, share_converged: float) -> None: ...


@dataclass(frozen=True)
class StreamingOptions:
    """How to stream; see :class:`eva_lightning.EVAInitCallback` for the meaning of each.

    ``k`` is the number of components per layer, capped at a layer's width. ``stopping="never"``: all minibatches.
    """

    k: int
    tau: float = 0.99
    delta: float = 1.0
    max_batches: int = 64
    tokens_per_sample: TokensPerSample = "auto"
    engine: str = "auto"
    stopping: str = "auto"
    seed: int = 0
    memory_budget: int = 2**31
    offload: bool = False


def compute_eva_state(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    layers: Mapping[str, nn.Module | LayerInputs],
    options: StreamingOptions,
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Progress | None = None,
    minor: bool = False,
) -> EVAState:
    """Decompose the inputs of ``layers`` over the first minibatches (paper, Algorithm 1, lines 1 to 8).

    The model runs in eval mode without gradients; its modes, buffers and metrics are as before afterwards. In a
    ``torch.distributed`` job every rank streams its own minibatches and all return the same state, that of the union.

    Args:
        model: what ``forward_fn`` runs.
        batches: gives the minibatches, from the start at each call (rarely twice: when inputs stop being shared).
        layers: canonical name -> the layer whose inputs to decompose, or how to read them
            (:mod:`eva_lightning.layer_inputs`).
        options: see :class:`StreamingOptions`.
        forward_fn: ``forward_fn(model, batch)``; default :func:`eva_lightning.batch_forward.run_forward`.
        mask_fn: ``mask_fn(batch)`` -> bool tensor of the tokens that count, or ``None``.
        context: entered around each forward pass (autocast).
        progress: told after every minibatch.
        minor: return the directions of least variance instead (EVA-minor, paper Table 12); exact engine only.

    Returns:
        A state with up to ``k`` components per layer and no ranks yet. Layers that never ran are left out.

    Raises:
        InputError: no minibatch at all, or no layer ran.
        FloatingPointError: NaN or infinite activations; names layer and minibatch.
    """
    inputs = {n: x if isinstance(x, LayerInputs) else inputs_of(x) for n, x in layers.items()}
    never_share: set[str] = set()
    started = time.perf_counter()
    while True:
        try:
            return _stream(
                model, batches(), inputs, options, forward_fn, mask_fn, context, progress, minor, never_share, started
            )
        except SharingChanged as signal:
            never_share |= signal.layers


def _stream(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, LayerInputs],
    options: StreamingOptions,
    forward_fn: ForwardFn | None,
    mask_fn: MaskFn | None,
    context: Callable[[], AbstractContextManager[Any]],
    progress: Progress | None,
    minor: bool,
    never_share: set[str],
    started: float,
) -> EVAState:
    plan = allocation(layers, options, minor)
    engines = plan.engines()
    width = round(statistics.median(plan.widths.values()))
    choice = TokenChoice(options.tokens_per_sample, options.seed, width)
    capture = InputCapture(layers, engines, choice, never_share)
    stopping = _stopping_rule(options)
    converged: dict[str, bool] = {}
    iterator, n, exhausted = iter(batches), 0, False
    with capture.watching(), observing(model), _closed_at_the_end(iterator):
        while n < options.max_batches:
            batch = None if exhausted else next(iterator, _END)
            exhausted = exhausted or batch is _END
            if _all_ranks(exhausted):
                break
            n += 1
            if not exhausted:
                capture.begin(None if mask_fn is None else mask_fn(batch))
                with context():
                    no_grad_forward(forward_fn, model, batch)
                capture.end()
            if progress is not None:
                progress(n, sum(converged.values()) / max(1, len(converged)))
            if not stopping.due(n):
                continue
            converged = stopping.check(n, _own_engines(capture), across_ranks=_world_size() > 1)
            # for all layers at once: one that went on alone would be measured on other data; and for all ranks at
            # once, whatever the last bit says on unequal machines
            if _all_ranks(bool(converged) and sum(converged.values()) >= options.delta * len(converged)):
                break
    if n == 0:
        raise InputError("the training data loader gave no minibatch; EVA needs at least one to look at")
    state = _collect(capture, stopping, converged, plan, n, minor, options)
    state.seconds = time.perf_counter() - started
    return state


_END = object()


@contextmanager
def _closed_at_the_end(iterator: Iterator[Any]) -> Iterator[None]:
    """Close a generator now: left to the garbage collector, it would restore random states in mid-training."""
    try:
        yield
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def allocation(layers: Mapping[str, LayerInputs], options: StreamingOptions, minor: bool = False) -> Allocation:
    """The engines :func:`compute_eva_state` will use, and their memory."""
    engine = "exact" if minor else options.engine
    # who asks for every token asks for exactness
    thrifty = options.tokens_per_sample is not None
    return Allocation.plan(layers, options.k, engine, options.memory_budget, options.offload, thrifty)


def _stopping_rule(options: StreamingOptions) -> StoppingRule:
    rule = options.stopping
    if rule == "never":
        return _NeverConverged()
    if rule == "auto":
        rule = "cosine" if options.engine == "incremental" else "captured"
    return make_stopping_rule(rule, options.tau)


class _NeverConverged:
    """Stream all there is."""

    def __init__(self) -> None:
        self.history: dict[str, list[tuple[int, float]]] = {}

    def due(self, n_batches: int) -> bool:
        return False

    def check(self, n_batches: int, engines: Mapping[str, StreamingSVD], across_ranks: bool = False) -> dict[str, bool]:
        return dict.fromkeys(engines, False)


def _own_engines(capture: InputCapture) -> dict[str, StreamingSVD]:
    """The engines that own a decomposition; without tokens where the layer has not run (on this rank)."""
    return {n: e for n, e in capture.engines.items() if n not in capture.owner}


def _minor_results(engines: Mapping[str, StreamingSVD]) -> dict[str, SVDResult]:
    results = {}
    for name, engine in engines.items():
        union = engine.clone().all_reduce() if _world_size() > 1 else engine
        if isinstance(union, ExactSVD) and union.n_samples:
            results[name] = union.minor(union.k)
    return results


def _collect(
    capture: InputCapture,
    stopping: StoppingRule,
    converged: Mapping[str, bool],
    plan: Allocation,
    n_batches: int,
    minor: bool,
    options: StreamingOptions,
) -> EVAState:
    engines = _own_engines(capture)
    results = _minor_results(engines) if minor else solve(engines, across_ranks=_world_size() > 1).results
    names = [n for n in capture.layers if capture.owner.get(n, n) in results]
    if not names:
        raise InputError("none of the layers to adapt ran in the forward pass; check forward_fn and target_modules")
    of = {n: capture.owner.get(n, n) for n in names}
    components = {n: results[n].components.cpu() for n in set(of.values())}
    state = EVAState(
        ranks={},
        components={n: components[of[n]] for n in names},
        singular_values={n: results[of[n]].singular_values.cpu() for n in names},
        explained_variance_ratio={n: results[of[n]].explained_variance_ratio.cpu() for n in names},
        total_variance={n: results[of[n]].total_variance for n in names},
        n_samples={n: results[of[n]].n_samples for n in names},
        converged={n: bool(converged.get(of[n], False)) for n in names},
        n_batches=n_batches,
        shared_with={n: of[n] for n in names if of[n] != n},
        convergence={n: list(curve) for n, curve in stopping.history.items()},
        meta={
            "engine": "+".join(sorted(set(plan.kinds.values()))),
            "components": "minor" if minor else "major",
            "tau": options.tau,
            "delta": options.delta,
            "tokens_per_sample": "all" if options.tokens_per_sample is None else options.tokens_per_sample,
            "state_bytes": plan.bytes,
        },
    )
    return _same_on_all_ranks(state)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_ranks(flag: bool) -> bool:
    if _world_size() == 1:
        return flag
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    votes = torch.tensor(int(flag), device=device)
    dist.all_reduce(votes)
    return int(votes) == _world_size()


def _same_on_all_ranks(state: EVAState) -> EVAState:
    """Rank 0's state everywhere: equal sums can still differ in the last bit between unequal machines."""
    if _world_size() == 1:
        return state
    box: list[Any] = [state]
    dist.broadcast_object_list(box, src=0)
    return box[0]
