"""Which adapters are set: a mark that every LoRA layer keeps at its own A, and that lives as long as that A.

Copies and pickles of a module have it; a merge, a new network, a second adapter, or one that PEFT deletes, adds or
makes again do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eva_lightning.adapters import AdapterLayer

_MARK = "_eva_lightning_done"
_SAMPLE = 64


def mark_done(layers: Iterable[AdapterLayer], how: str) -> None:
    """Note on the layers that their adapters are set: "initialised" by EVA, or "restored" from a checkpoint."""
    for layer in layers:
        # what a checkpoint holds is not there yet when its layers are made ready for it
        sample = _sample(layer) if how == "initialised" else None
        setattr(_holder(layer), _MARK, {"how": how, "a": sample})


def unmark(layers: Iterable[AdapterLayer]) -> None:
    """Forget what :func:`mark_done` noted."""
    for layer in layers:
        vars(_holder(layer)).pop(_MARK, None)


def unmark_reset(layers: Iterable[AdapterLayer]) -> None:
    """Forget it where an adapter was made new in place: B is zero again, and A points elsewhere than it did.

    ``reset_lora_parameters`` and a ``state_dict`` from before the fit do that, in cross-validation for one. Weight
    decay shortens A; its direction stays while B is zero.
    """
    for layer in layers:
        before, now = (getattr(_holder(layer), _MARK, None) or {}).get("a"), _sample(layer)
        if before is None or now is None or len(before) != len(now):
            continue
        if layer.is_fresh and torch.nn.functional.cosine_similarity(before, now, dim=0) < 0.9:
            unmark([layer])


def without_mark(layers: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer]:
    """The layers that nobody has set yet."""
    return {name: layer for name, layer in layers.items() if not hasattr(_holder(layer), _MARK)}


def done(module: nn.Module) -> str | None:
    """How active adapters of ``module`` were set, or ``None`` where none of them was."""
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "lora_A")]
    holders = [m.lora_A[a] for m in layers for a in getattr(m, "active_adapters", ()) if a in m.lora_A]
    return next((mark["how"] for mark in (getattr(holder, _MARK, None) for holder in holders) if mark), None)


def _holder(layer: AdapterLayer) -> nn.Module:
    return layer.module.lora_A[layer.adapter]


def _sample(layer: AdapterLayer) -> Tensor | None:
    """Some values of A; None where they are spread over processes, or nowhere."""
    if layer.a.device.type == "meta" or hasattr(layer.a, "full_tensor"):
        return None
    flat = layer.a.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLE)].float().cpu().clone()
