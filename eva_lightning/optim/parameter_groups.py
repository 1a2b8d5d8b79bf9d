"""What each parameter is trained with: layer-wise decay of the learning rate, multipliers by name, weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from eva_lightning.errors import InputError

Multiplier = Callable[[str], float]
"""From a parameter's name in the LightningModule to the factor on its learning rate."""

WITH_LAYER_BEFORE = (99999,)
"""How timm's ``group_matcher`` marks what belongs to the layer before it (its ``MATCH_PREV_GROUP``)."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    weight_decay: float,
    *,
    multipliers: Iterable[Multiplier | None] = (),
    decay_matrices_only: bool = False,
    decays: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """An optimizer's groups ``{"params", "lr", "weight_decay"}``, one per pair of values, in order of appearance.

    Args:
        named_parameters: Names and parameters; those without ``requires_grad`` are passed over.
        lr: Learning rate where all multipliers are 1.
        weight_decay: For all, or for those with two or more dimensions.
        multipliers: Their product is the factor on `lr`; 0 keeps the parameter where it is, None is a factor of 1.
        decay_matrices_only: No weight decay on parameters of one dimension or none (biases, norms, LayerScale, DoRA's
            magnitudes).
        decays: Names of the parameters that weight decay is for; None for all.

    Raises:
        InputError: A multiplier gives a negative number or NaN; names the parameter.
    """
    chosen = [multiplier for multiplier in multipliers if multiplier is not None]
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        factor = 1.0
        for multiplier in chosen:
            factor *= multiplier(name)
        if not factor >= 0:
            raise InputError(f"the learning-rate multiplier of {name} must be at least 0, got {factor}")
        exempt = (decay_matrices_only and parameter.ndim <= 1) or (decays is not None and name not in decays)
        decay = 0.0 if exempt else weight_decay
        empty = {"params": [], "lr": lr * factor, "weight_decay": decay}
        groups.setdefault((factor, decay), empty)["params"].append(parameter)
    return list(groups.values())


def linear_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights of linear layers: those that minGPT, and ``get_optim_groups`` of ``ml-jku/L2M``, decay.

    All else is left out: biases, norms, embedding tables, and parameters that no such layer holds.
    """
    return frozenset(
        f"{name}.weight" if name else "weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)
    )


def layer_decay(model: nn.Module, factor: float) -> dict[str, float]:
    """Layer-wise decay of the learning rate: ``factor ** (layers above it)`` for every parameter of a timm model.

    The layers are those of timm's ``group_matcher``, but that what stands after the blocks (final norms) belongs with
    the head, as in BEiT's rule and the EVA authors' code, where timm puts it with the last block. Of a ViT of d blocks,
    patch, position, class and register embeddings have the multiplier ``factor ** (d + 1)``, block i (from 0)
    ``factor ** (d - i)``, and final norm and head 1 (Clark et al., 2020; EVA paper, section D.2).

    Returns:
        Multiplier by name in ``model.named_parameters()``.

    Raises:
        InputError: The model does not say in which order its layers come.
    """
    from timm.models import group_parameters  # a second of import that only timm models need

    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        raise InputError(
            f"{type(model).__name__} does not say in which order its layers come (timm's group_matcher), which "
            "layer-wise learning-rate decay needs: use another model or set layer_decay to None"
        )
    order: dict[str, int] = group_parameters(model, _without_ends(matcher(coarse=False)), reverse=True)
    # learned rotary embeddings, which timm's patterns leave to the head
    order |= {name: 0 for name in order if name.startswith("rope.")}
    last = max(order.values())
    return {name: factor ** (last - layer) for name, layer in order.items()}


def _without_ends(matcher: Any) -> Any:
    """timm's patterns of layers without those of what stands after the blocks: unmatched, it goes with the head.

    Such a pattern says "with the layer before" of something that is not numbered as blocks are.
    """
    if not isinstance(matcher, Mapping):
        return matcher
    return {
        group: [p for p in patterns if p[1] != WITH_LAYER_BEFORE or re.compile(p[0]).groups]
        if isinstance(patterns, (list, tuple))
        else patterns
        for group, patterns in matcher.items()
    }
