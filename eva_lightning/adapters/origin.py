"""Where adapters come from: what initialised them, noted at every A, for the card of an exported adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from eva_lightning.adapters.adapter_layer import AdapterLayer
from eva_lightning.state import EVAState

_MARK = "_eva_lightning_origin"

Facts = Mapping[str, str | int | float]


def note_origin(layers: Iterable[AdapterLayer], facts: Facts) -> None:
    """Note `facts` on the layers' adapters; they live as long as their A."""
    for layer in layers:
        setattr(layer.module.lora_A[layer.adapter], _MARK, dict(facts))


def origin_of(layers: Iterable[AdapterLayer]) -> Facts:
    """What :func:`note_origin` noted on the first of the layers that has something; empty without."""
    notes: Iterable[Facts] = (getattr(layer.module.lora_A[layer.adapter], _MARK, {}) for layer in layers)
    return next((note for note in notes if note), {})


def eva_origin(state: EVAState) -> Facts:
    """What a card says of adapters that EVA initialised: ρ, the mean rank r over all layers, what was streamed."""
    usual = {"init": "eva", "metric": "ratio", "algorithm": "fast"}
    other = {name: state.meta[name] for name, value in usual.items() if state.meta.get(name, value) != value}
    rho = {"ρ": state.meta["rho"]} if "rho" in state.meta else {}
    r = sum(state.ranks.values()) / max(1, len(state.ranks))
    return {"method": "EVA", **rho, "r": r, **other, "minibatches streamed": state.n_batches}
