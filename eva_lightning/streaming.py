"""Drive minibatches through a model and its layers' streaming SVDs until they have converged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

from torch import nn

from eva_lightning.batch_forward import ForwardFn, MaskFn, no_grad_forward
from eva_lightning.capture import InputCapture, SharingChanged
from eva_lightning.engine_plan import Allocation
from eva_lightning.errors import InputError
from eva_lightning.layer_inputs import LayerInputs, inputs_of
from eva_lightning.output import warn
from eva_lightning.selection import Selection, Spectrum
from eva_lightning.side_effects import observing
from eva_lightning.state import EVAState
from eva_lightning.streaming_options import StreamingOptions
from eva_lightning.svd import (
    ExactSVD,
    SelectedCosineRule,
    StoppingRule,
    StreamingSVD,
    SVDResult,
    make_stopping_rule,
    solve,
)
from eva_lightning.svd.distributed import all_ranks, from_first_rank, world_size
from eva_lightning.token_masks import TokenMasks
from eva_lightning.token_subsampling import TokenChoice


class Progress(Protocol):
    """Called after every minibatch with their number so far and the share of layers that have converged (of components
    that get a rank with the paper's algorithm)."""

    def __call__(self, n_batches: int, share_converged: float) -> None: ...


def compute_eva_state(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    layers: Mapping[str, nn.Module | LayerInputs],
    k: int,
    options: StreamingOptions | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Progress | None = None,
    minor: bool = False,
    selection: Selection | None = None,
) -> EVAState:
    """Decompose the inputs of ``layers`` over the first minibatches (paper, Algorithm 1, lines 1 to 8).

    The model runs in eval mode without gradients; its modes, buffers and metrics are as before afterwards. In a
    ``torch.distributed`` job every rank streams its own minibatches and all return the same state, that of the union.

    Args:
        model: what ``forward_fn`` runs.
        batches: gives the minibatches, from the start at each call: called again when they end, with the paper's
            algorithm, and when inputs stop being shared.
        layers: canonical name -> the layer whose inputs to decompose, or how to read them
            (:mod:`eva_lightning.layer_inputs`).
        k: components per layer; narrower layers keep as many as they are wide.
        options: how to stream and decompose; default ``StreamingOptions()``.
        forward_fn: ``forward_fn(model, batch)``; default :func:`eva_lightning.batch_forward.run_forward`.
        mask_fn: ``mask_fn(batch)`` -> bool tensor of the tokens that count, or ``None``.
        context: entered around each forward pass (autocast).
        progress: called after every minibatch.
        minor: return the directions of least variance instead (EVA-minor, paper Table 12); exact engine only.
        selection: which components get a rank, with the paper's algorithm; default: all ``k`` of every layer.

    Returns:
        A state with up to ``k`` components per layer and no ranks yet. Layers that never ran are left out.

    Raises:
        InputError: no minibatch at all, or no layer ran.
        FloatingPointError: NaN or infinite activations; names layer and minibatch.
    """
    started = time.perf_counter()
    options = (StreamingOptions() if options is None else options).resolved()
    inputs = {n: x if isinstance(x, LayerInputs) else inputs_of(x) for n, x in layers.items()}
    plan = Allocation.plan(inputs, k, options, minor)
    selection = Selection(dict.fromkeys(inputs, k)) if selection is None else selection

    def run(batch: Any) -> None:
        with context():
            no_grad_forward(forward_fn, model, batch)

    never_share: set[str] = set()
    while True:
        choice = TokenChoice(options.tokens_per_sample, options.seed)
        capture = InputCapture(inputs, plan.engines(), choice, never_share)
        stopping = _stopping_rule(options, capture, selection)
        stream = batches() if options.algorithm == "fast" else started_over(batches)
        try:
            with capture.watching(), observing(model):
                n_batches, converged = _stream(stream, run, capture, stopping, options, mask_fn, progress)
            break
        except SharingChanged as signal:
            never_share |= signal.layers
    if n_batches == 0:
        raise InputError("the training data loader gave no minibatch; EVA needs at least one")
    state = _collect(capture, minor)
    state.n_batches = n_batches
    state.converged = {n: converged.get(capture.owner.get(n, n), False) for n in state.components}
    state.convergence = {n: list(curve) for n, curve in stopping.history.items()}
    state.meta = {
        "algorithm": options.algorithm,
        "engine": "+".join(sorted(set(plan.kinds.values()))),
        "components": "minor" if minor else "major",
        "tau": options.tau,
        "delta": options.delta,
        "tokens_per_sample": "all" if options.tokens_per_sample is None else options.tokens_per_sample,
        "state_bytes": plan.bytes,
    }
    if isinstance(stopping, SelectedCosineRule):
        _say_what_converged(state, stopping, selection, options)
    state = from_first_rank(state)
    state.seconds = time.perf_counter() - started
    return state


def _stream(
    batches: Iterable[Any],
    run: Callable[[Any], None],
    capture: InputCapture,
    stopping: StoppingRule,
    options: StreamingOptions,
    mask_fn: MaskFn | None,
    progress: Progress | None,
) -> tuple[int, dict[str, bool]]:
    """Run the model on minibatches until enough layers have converged; how many, and which layers."""
    converged: dict[str, bool] = {}
    masks = TokenMasks(mask_fn)
    iterator, n, exhausted = iter(batches), 0, False
    with _closed_at_the_end(iterator):
        while n < options.limit:
            batch = None if exhausted else next(iterator, _END)
            exhausted = exhausted or batch is _END
            if all_ranks(exhausted):
                break
            n += 1
            if not exhausted:
                capture.begin(masks.begin(batch))
                run(batch)
                capture.end()
                masks.end()
            if progress is not None:
                progress(n, stopping.share(converged))
            if not stopping.due(n):
                continue
            converged = stopping.check(n, _own_engines(capture), across_ranks=world_size() > 1)
            capture.paused = stopping.paused
            # for all layers at once: one that went on alone would be measured on other data; and for all ranks at
            # once, whatever the last bit says on unequal machines
            if all_ranks(bool(converged) and stopping.share(converged) >= options.delta):
                break
    return n, converged


def started_over(batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The minibatches from the start again whenever they end; none if there are none."""
    found = True
    while found:
        found = False
        iterator = iter(batches())
        with _closed_at_the_end(iterator):
            for batch in iterator:
                found = True
                yield batch


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


def _stopping_rule(options: StreamingOptions, capture: InputCapture, selection: Selection) -> StoppingRule:
    if options.algorithm == "paper":
        return SelectedCosineRule(options.tau, partial(_selected, capture, selection))
    automatic = "cosine" if options.engine == "incremental" else "captured"
    return make_stopping_rule(automatic if options.stopping == "auto" else options.stopping, options.tau)


def _selected(capture: InputCapture, selection: Selection, results: Mapping[str, SVDResult]) -> dict[str, list[int]]:
    """For every decomposition how many of its components get a rank, once for each layer that it stands for."""
    owners = {n: capture.owner.get(n, n) for n in capture.layers}
    spectra = {
        n: Spectrum(r.singular_values, r.total_variance, r.n_samples, r.components.shape[1])
        for n, owner in owners.items()
        if (r := results.get(owner)) is not None
    }
    ranks = selection.of(spectra)
    return {owner: [ranks[n] for n in spectra if owners[n] == owner] for owner in results}


def _say_what_converged(
    state: EVAState, stopping: SelectedCosineRule, selection: Selection, options: StreamingOptions
) -> None:
    """Note for which ranks the stream stopped, and warn of components that have not converged at the limit."""
    passed, selected = stopping.counts()
    state.meta |= {"selection": str(selection), "selected": selected, "selected_converged": passed}
    if selected == passed or stopping.share(state.converged) >= options.delta:
        return
    late = [n for n, done in state.converged.items() if not done]
    warn(
        f"EVA: after {state.n_batches} minibatches, the most allowed, {selected - passed} of the {selected} components "
        f"that get a rank had not converged to tau={options.tau:g}, in {len(late)} of {len(state.converged)} layers "
        f"(such as {late[0]}); they are used as they are: raise max_batches, or lower tau or delta"
    )


def _own_engines(capture: InputCapture) -> dict[str, StreamingSVD]:
    """The engines that own a decomposition; without tokens where the layer has not run (on this rank)."""
    return {n: e for n, e in capture.engines.items() if n not in capture.owner}


def _minor_results(engines: Mapping[str, StreamingSVD]) -> dict[str, SVDResult]:
    results = {}
    for name, engine in engines.items():
        union = engine.clone().all_reduce() if world_size() > 1 else engine
        if isinstance(union, ExactSVD) and union.n_samples:
            results[name] = union.minor(union.k)
    return results


def _collect(capture: InputCapture, minor: bool) -> EVAState:
    """The decompositions, on the CPU; layers that shared an input share their components."""
    engines = _own_engines(capture)
    found = _minor_results(engines) if minor else solve(engines, across_ranks=world_size() > 1).results
    found = {n: result.to("cpu") for n, result in found.items()}
    of = {n: capture.owner.get(n, n) for n in capture.layers if capture.owner.get(n, n) in found}
    if not of:
        raise InputError(
            "none of the layers to adapt ran in the forward pass, or mask_fn left no token; check forward_fn, mask_fn "
            "and target_modules"
        )
    results = {n: found[owner] for n, owner in of.items()}
    return EVAState(
        components={n: result.components for n, result in results.items()},
        singular_values={n: result.singular_values for n, result in results.items()},
        explained_variance_ratio={n: result.explained_variance_ratio for n, result in results.items()},
        total_variance={n: result.total_variance for n, result in results.items()},
        n_samples={n: result.n_samples for n, result in results.items()},
        shared_with={n: owner for n, owner in of.items() if owner != n},
    )
