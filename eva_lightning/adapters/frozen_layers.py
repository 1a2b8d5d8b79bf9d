"""Which layers of a module train as it stands: what a user froze is not to move without a word."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from eva_lightning.adapters.supported_layers import is_linear


def training_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers with a weight matrix (or filters) that trains, by name; linear ones and all other kinds.

    Norms, embeddings, biases and single parameters do not count: that they train does not make a frozen network one
    that is trained. Nor do metrics, which may hold whole networks (FID).
    """
    aside = metric_parts(module)
    ancestors: dict[int, list[nn.Module]] = {}
    found: dict[str, nn.Module] = {}
    for name, m in module.named_modules():
        for child in m.children():
            ancestors.setdefault(id(child), [m, *ancestors.get(id(m), [])])
        if id(m) not in aside and _trains(m, ancestors.get(id(m), [])):
            found[name] = m
    return found


def _trains(layer: nn.Module, ancestors: list[nn.Module]) -> bool:
    if not is_linear(layer):
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            return False
        own = layer.named_parameters(recurse=False)
        return any(p.requires_grad and p.dim() > 1 and "weight" in name for name, p in own)
    # by all parameters: those of a parametrised weight belong to modules below the layer
    weights = [p for name, p in layer.named_parameters() if "bias" not in name.rpartition(".")[2]]
    if any(p.is_floating_point() for p in weights):
        return any(p.requires_grad for p in weights)
    # a quantised weight cannot train whatever the user wants: what is around it tells
    for m in [layer, *ancestors]:
        flags = [p.requires_grad for p in m.parameters() if p.is_floating_point()]
        if flags:
            return any(flags)
    return False


def metric_parts(module: nn.Module) -> set[int]:
    """The ids of modules that only torchmetrics' metrics hold: no part of what is trained."""
    # not imported for this: a module that is not loaded has no instances
    metric = getattr(sys.modules.get("torchmetrics"), "Metric", None)
    if metric is None or not any(isinstance(m, metric) for m in module.modules()):
        return set()
    outside: set[int] = set()
    stack = [module]
    while stack:
        m = stack.pop()
        if id(m) not in outside and not isinstance(m, metric):
            outside.add(id(m))
            stack.extend(m.children())
    return {id(m) for m in module.modules()} - outside


def by_training(module: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Of named modules, those that train in full, in part and not at all; ones that are gone are nowhere."""
    modules = dict(module.named_modules(remove_duplicate=False))
    flags = {n: [p.requires_grad for p in modules[n].parameters()] for n in names if n in modules}
    full = [n for n, own in flags.items() if own and all(own)]
    part = [n for n, own in flags.items() if any(own) and n not in full]
    return full, part, [n for n, own in flags.items() if not any(own)]
