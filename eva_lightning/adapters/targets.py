"""Which layers of a plain module get an adapter, and which one is its output head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from eva_lightning.adapters.supported_layers import OUT_PROJECTION_IS_SILENT, is_adaptable, is_linear, refusal
from eva_lightning.errors import InputError, unknown

HEAD_NAMES = frozenset(
    {"head", "heads", "classifier", "score", "lm_head", "fc", "fc_out", "out", "output", "output_layer", "predictor"}
)
"""Last parts of the names under which model libraries keep their output layer."""


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear (and transformers' Conv1D) of ``module`` that is called as a layer, by name.

    ``nn.MultiheadAttention`` reads the weight of its ``out_proj`` without calling it: an adapter there would never run.
    """
    silent = _silent(module)
    return {n: m for n, m in module.named_modules() if is_linear(m) and id(m) not in silent}


def adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every layer of ``module`` that can be a target: linear layers, convolutions, nn.MultiheadAttention; by name."""
    silent = _silent(module)
    return {n: m for n, m in module.named_modules() if is_adaptable(m) and id(m) not in silent}


def _silent(module: nn.Module) -> set[int]:
    return {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}


def find_head(module: nn.Module, head: str | Sequence[str] | None = "auto") -> list[str]:
    """The names of the output layers, which train in full and get no adapter.

    Names match whole names or, where there is none, last dotted parts, as in PEFT's ``modules_to_save``.
    "auto" asks the model (timm's ``get_classifier``, transformers' ``get_output_embeddings``), then looks for an
    nn.Linear outside repeated blocks with a customary name (``HEAD_NAMES``), then takes the last nn.Linear defined.

    Raises:
        InputError: a name given is not in the module.
    """
    if head is None:
        return []
    if head != "auto":
        known = [n for n, _ in module.named_modules() if n]
        names = [head] if isinstance(head, str) else list(head)
        return [n for name in names for n in ([name] if name in known else select(known, [name], "head"))]
    layers = linear_layers(module)
    for accessor in ("get_classifier", "get_output_embeddings"):
        found = _ask(module, accessor, layers)
        if found:
            return found
    last = list(layers)[-1:]
    named = [n for n in layers if _customary(n)]
    if not named or (last and _outside_blocks(last[0]) and last[0].count(".") < named[-1].count(".")):
        return last
    return [named[-1]]


def language_model_heads(module: nn.Module) -> list[str]:
    """The names of projections onto a vocabulary (transformers' ``get_output_embeddings``).

    They are part of what was pre-trained, large, and often the embedding matrix itself: not for training in full
    unless asked for.
    """
    return _ask(module, "get_output_embeddings", linear_layers(module))


def find_targets(
    module: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | Sequence[str] | None = "auto",
) -> tuple[list[str], list[str]]:
    """Names of the layers to adapt and of the head.

    Args:
        module: a module without adapters.
        target_modules: which layers to adapt; ``None`` means every linear one (nn.Linear, Conv1D) but the head. Names
            match as in PEFT: an entry of a list matches a whole name or its last dotted parts, a string is a regular
            expression for the whole name. An entry means the linear layers it matches; convolutions and
            nn.MultiheadAttention only if it matches no linear layer or is their whole name: "proj" must not reach a
            vision transformer's ``patch_embed.proj``.
        exclude: layers to leave alone, matched the same way, from whatever ``target_modules`` gives.
        head: see :func:`find_head`.

    Raises:
        InputError: an entry matches nothing (the nearest name is suggested) or a layer that cannot be adapted (an
            nn.Embedding, a grouped convolution; says why), or nothing is left to adapt.
    """
    layers = list(linear_layers(module))
    heads = find_head(module, head)
    if target_modules is None or target_modules == "all-linear":
        targets = [n for n in layers if not any(n == h or n.startswith(f"{h}.") for h in heads)]
    else:
        targets = _select_targets(module, target_modules)
        heads = [h for h in heads if h not in targets]
    if exclude is not None:
        dropped = set(select(list(adaptable_layers(module)), exclude, "exclude"))
        targets = [n for n in targets if n not in dropped]
    for name in targets:
        _refuse(name, refusal(module.get_submodule(name)))
    if not targets:
        raise InputError(
            f"{type(module).__name__} has no layer to adapt: {len(layers)} nn.Linear in all, output head {heads}; "
            "name the layers with target_modules= or the head with head="
        )
    return targets, heads


def _select_targets(module: nn.Module, patterns: str | Iterable[str]) -> list[str]:
    names = list(adaptable_layers(module))
    linear = list(linear_layers(module))
    others = [n for n in names if n not in set(linear)]
    is_regex = isinstance(patterns, str)
    keep: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = _matches(linear, pattern, is_regex) or _matches(others, pattern, is_regex)
        if pattern in others:
            hits.append(pattern)
        if not hits:
            _explain(module, pattern, is_regex)
            raise InputError(f"target_modules: {unknown_layer(pattern, names)}")
        keep.update(hits)
    return [n for n in names if n in keep]


def _explain(module: nn.Module, pattern: str, is_regex: bool) -> None:
    """Raise if what the pattern matches cannot be adapted."""
    silent = _silent(module)
    for name in _matches([n for n, _ in module.named_modules() if n], pattern, is_regex):
        layer = module.get_submodule(name)
        _refuse(name, OUT_PROJECTION_IS_SILENT if id(layer) in silent else refusal(layer))


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise InputError(f"target_modules: {name!r} cannot be adapted: {reason}")


def select(names: Sequence[str], patterns: str | Iterable[str], argument: str) -> list[str]:
    """Those of ``names`` that match ``patterns`` (see :func:`find_targets`), in their order.

    Raises:
        InputError: a pattern matches none of them; names the argument, the pattern and the nearest name.
    """
    is_regex = isinstance(patterns, str)
    keep: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = _matches(names, pattern, is_regex)
        if not hits:
            raise InputError(f"{argument}: {unknown_layer(pattern, names)}")
        keep.update(hits)
    return [n for n in names if n in keep]


def _matches(names: Sequence[str], pattern: str, is_regex: bool) -> list[str]:
    if is_regex:
        hits = [n for n in names if re.fullmatch(pattern, n) or n == pattern]
        if hits or not re.fullmatch(r"[\w.]+", pattern):
            return hits
    return [n for n in names if n == pattern or n.endswith(f".{pattern}")]


def unknown_layer(name: str, known: Iterable[str]) -> str:
    """:func:`eva_lightning.errors.unknown` for layers, which may be named by their last parts too."""
    parts = {part for k in known for part in (k, k.rsplit(".", 1)[-1], ".".join(k.split(".")[-2:]))}
    return unknown("layer", name, sorted(parts), list_all=False)


def _ask(module: nn.Module, accessor: str, layers: Mapping[str, nn.Module]) -> list[str]:
    by_id = {id(m): n for n, m in layers.items()}
    for m in module.modules():
        out = getattr(m, accessor, None)
        if callable(out):
            found = [by_id[id(x)] for x in _modules_of(out()) if id(x) in by_id]
            if found:
                return found
    return []


def _customary(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in HEAD_NAMES and _outside_blocks(name)


def _outside_blocks(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _modules_of(value: object) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return list(value.modules())
    if isinstance(value, (list, tuple)):
        return [m for v in value for m in _modules_of(v)]
    return []
