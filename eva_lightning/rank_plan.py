"""From a decomposition to a model: which rank and which A each layer gets, and writing them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eva_lightning.adapters import AdapterLayer
from eva_lightning.adapters.registry import remove, sync_configs
from eva_lightning.adapters.targets import unknown_layer
from eva_lightning.errors import InputError
from eva_lightning.initialization import initial_a
from eva_lightning.selection import Selection, Spectrum
from eva_lightning.side_effects import isolated_rng
from eva_lightning.state import EVAState


@dataclass(frozen=True)
class Plan:
    """What each layer gets.

    Attributes:
        a: layer -> A (rank, in_features); layers with rank 0 are missing.
        state: the decomposition with ``ranks`` filled in.
        uniform: the ranks before.
        untouched: layers that never ran; they keep what they have, or have lost their adapter too.
        capped: layers narrower than their share of components.
    """

    a: dict[str, Tensor]
    state: EVAState
    uniform: dict[str, int]
    untouched: list[str] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)

    @property
    def replaces_parameters(self) -> bool:
        """Whether a layer changes its rank, and with it its parameters."""
        return self.state.ranks != self.uniform


def selection_of(layers: Mapping[str, AdapterLayer], rho: float, metric: str, init: str) -> Selection:
    """How the layers share their ranks.

    The budget is the sum of the layers' ranks; a layer gets at most ``round(r * rho)`` and its input width. EVA-minor
    keeps uniform ranks, as in the paper (Table 12), and so do layers that PEFT can store with one rank only
    (nn.MultiheadAttention): those stay out of the budget.
    """
    minor = init == "minor"
    fixed = frozenset(n for n, layer in layers.items() if minor or layer.has_fixed_rank)
    return Selection({n: layer.rank for n, layer in layers.items()}, 1.0 if minor else rho, metric, fixed)


def make_plan(
    layers: Mapping[str, AdapterLayer],
    state: EVAState,
    rho: float,
    metric: str,
    init: str,
    seed: int = 0,
    given: bool = False,
    drop_idle: bool = False,
) -> Plan:
    """Ranks from the explained variance (paper section 3.5, :func:`selection_of`) and A from the components.

    Layers that never ran lose their adapter with ``drop_idle``.

    Raises:
        InputError: ``given`` and the state lacks a layer, has another width, holds too few components, or those of the
            other end of the spectrum.
    """
    selection = selection_of(layers, rho, metric, init)
    if given:
        _check_fits(layers, state, selection.rho, init)
    measured = {n: layer for n, layer in layers.items() if n in state.components}
    ranks = selection.of(
        {
            n: Spectrum(state.singular_values[n], state.total_variance[n], state.n_samples[n], layer.in_features)
            for n, layer in measured.items()
        }
    )
    generator = torch.Generator().manual_seed(seed)
    a = {
        n: initial_a(
            init, state.components[n], state.singular_values[n], state.explained_variance_ratio[n], rank, generator
        )
        for n, rank in ranks.items()
        if rank > 0
    }
    untouched = [n for n in layers if n not in measured]
    ranks |= {n: 0 if drop_idle else layers[n].rank for n in untouched}
    state = dataclasses.replace(state, ranks={n: ranks[n] for n in layers})
    r = statistics.mean(layer.rank for layer in layers.values())
    state.meta = {**state.meta, "r": r, "rho": selection.rho, "metric": metric, "init": init}
    capped = [n for n, layer in measured.items() if layer.in_features < round(layer.rank * selection.rho)]
    return Plan(a, state, {n: layer.rank for n, layer in layers.items()}, untouched, capped)


def apply_plan(
    module: nn.Module,
    layers: Mapping[str, AdapterLayer],
    plan: Plan,
    injected: bool = False,
    rescale_alpha: bool = True,
) -> None:
    """Resize, remove and fill the layers; whoever calls undoes what a failure leaves half done.

    Args:
        module: holds the layers.
        layers: canonical name -> layer.
        plan: what each gets.
        injected: the adapters are ours: DoRA's magnitudes are set so that the function is exactly the base model's.
        rescale_alpha: keep a layer's scaling when its rank changes; otherwise its alpha.
    """
    with isolated_rng():
        for name, layer in layers.items():
            rank = plan.state.ranks[name]
            if rank == 0:
                remove(module, layer)
                continue
            if name in plan.untouched:
                continue
            if rank != layer.rank:
                layer.resize(rank, None if rescale_alpha else layer.alpha)
            layer.write(plan.a[name])
            if injected:
                layer.reset_magnitude()
        sync_configs(module)


def _check_fits(layers: Mapping[str, AdapterLayer], state: EVAState, rho: float, init: str) -> None:
    if not state.components:
        raise InputError(
            "the EVA state has no components, only ranks and spectra (that of a resumed run, or saved without); give "
            "the state of the run that streamed"
        )
    held_kind = state.meta.get("components", "minor" if state.meta.get("init") == "minor" else "major")
    wanted_kind = "minor" if init == "minor" else "major"
    if held_kind != wanted_kind:
        raise InputError(
            f"init={init!r} starts from the components of {_OF[wanted_kind]} variance, the EVA state holds those of "
            f"{_OF[str(held_kind)]}; compute one with init={'minor' if init == 'minor' else 'eva'!r}"
        )
    for name, layer in layers.items():
        if name not in state.components:
            if name in state.ranks:  # it did not run when the state was measured either
                continue
            raise InputError(f"the EVA state is of another model: {unknown_layer(name, state.components)}")
        held, width = state.components[name].shape
        if width != layer.in_features:
            raise InputError(
                f"the EVA state is of another model: layer {name!r} has {layer.in_features} inputs, there {width}"
            )
        wanted = min(round(layer.rank * rho), layer.in_features)
        if wanted > held:
            raise InputError(
                f"r * rho = {layer.rank} * {rho:g} asks for {wanted} components of layer {name!r}, the EVA state holds "
                f"{held}; compute it with a larger r * rho"
            )


def refuse_other_algorithm(state: EVAState, selection: Selection) -> None:
    """Refuse a state that the paper's algorithm did not compute for just this selection: it stops by it.

    Raises:
        InputError: The state is of the fast algorithm, or of other ranks, rho or metric.
    """
    made = state.meta.get("algorithm", "fast")
    if made != "paper":
        raise InputError(
            f"algorithm='paper' is asked for, but the given EVA state was computed by algorithm={made!r}: compute it "
            "with algorithm='paper', or leave that out",
            setting="algorithm",
        )
    if state.meta.get("selection") != str(selection):
        raise InputError(
            "with algorithm='paper' the stream stops by the components that get a rank: the given EVA state was "
            f"computed for {state.meta.get('selection')}, this run has {selection}; compute one for it",
            setting="algorithm",
        )


_OF = {"major": "most", "minor": "least"}
