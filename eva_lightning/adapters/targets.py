"""Which layers of a plain module get an adapter, and which one is its output head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from eva_lightning.adapters.frozen_layers import metric_parts, training_layers
from eva_lightning.adapters.supported_layers import (
    OUT_PROJECTION_IS_SILENT,
    is_adaptable,
    is_linear,
    refusal,
    unsupported,
    unsupported_kinds,
)
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
    outputs = {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    return outputs | metric_parts(module)


def find_head(module: nn.Module, head: str | Sequence[str] | None = "auto") -> list[str]:
    """The names of the output layers, which train in full and get no adapter.

    Names match whole names or, where there is none, last dotted parts, as in PEFT's ``modules_to_save``.
    "auto" asks the model (timm's ``get_classifier``, transformers' ``get_output_embeddings``), then looks for an
    nn.Linear outside repeated blocks with a customary name (``HEAD_NAMES``), then takes the last nn.Linear defined.
    Where some layers are frozen only those that train are looked at; where these are one layer, or all have customary
    names (``head.0`` and ``head.2``), or are nn.Linear of which none can feed another, all of them are the head.

    Raises:
        InputError: a name given is not in the module.
    """
    if head is None:
        return []
    if head != "auto":
        known = [n for n, _ in module.named_modules() if n]
        names = [head] if isinstance(head, str) else list(head)
        return [n for name in names for n in ([name] if name in known else select(known, [name], "head"))]
    return _find_output(module, linear_layers(module), training_layers(module))


def _find_output(module: nn.Module, layers: dict[str, nn.Module], training: dict[str, nn.Module]) -> list[str]:
    """The head that "auto" means, among ``layers``, the linear ones, of which some may not be among ``training``."""
    if not training or all(name in training for name in layers):
        return _likely_head(module, layers)
    customary = [_customary_part(name) for name in training]
    if all(customary):
        return list(dict.fromkeys(name for name in customary if name))
    if len(training) == 1 or _parallel(list(training.values())):
        return list(training)
    found = _likely_head(module, {n: m for n, m in layers.items() if n in training})
    if any(_customary(n) for n in found):
        return found
    return _likely_head(module, {n: m for n, m in layers.items() if n in training or _ends(module, n, training)})


def _ends(module: nn.Module, name: str, training: Iterable[str]) -> bool:
    """Whether a frozen layer may be the head of a network that is trained, and is no part of a frozen one."""
    parent = name.rpartition(".")[0]
    may = _customary(name) or isinstance(module.get_submodule(parent), nn.Sequential)
    return may and any(not parent or is_below(n, [parent]) for n in training)


def _likely_head(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
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


@dataclass(frozen=True)
class Choice:
    """What :func:`choose_layers` found.

    Attributes:
        targets: names of the layers to adapt.
        head: names of the output layers.
        left_frozen: names of layers that would be adapted if they were not frozen.
    """

    targets: list[str]
    head: list[str]
    left_frozen: list[str]


def find_targets(
    module: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | Sequence[str] | None = "auto",
    adapt_frozen: bool = False,
) -> tuple[list[str], list[str]]:
    """Names of the layers to adapt and of the head; see :func:`choose_layers`."""
    choice = choose_layers(module, target_modules, exclude, head, adapt_frozen)
    return choice.targets, choice.head


def choose_layers(
    module: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | Sequence[str] | None = "auto",
    adapt_frozen: bool = False,
) -> Choice:
    """Which layers to adapt, which are the head, and which are left alone because they are frozen.

    Args:
        module: a module without adapters.
        target_modules: which layers to adapt; ``None`` means every linear one (nn.Linear, Conv1D) but the head. Names
            match as in PEFT: an entry of a list matches a whole name or its last dotted parts, a string is a regular
            expression for the whole name. An entry means the linear layers it matches; convolutions and
            nn.MultiheadAttention only if it matches no linear layer or is their whole name: "proj" must not reach a
            vision transformer's ``patch_embed.proj``. The name of a module that holds layers (its whole name, or last
            parts that no layer has) means all layers below it.
        exclude: layers to leave alone, matched the same way, from whatever ``target_modules`` gives; a name means
            everything below each module that has it.
        head: see :func:`find_head`.
        adapt_frozen: what to do with layers whose weights do not train (``requires_grad_(False)``) where other layers
            than the head train, such as a teacher or one of two towers: by default they are left alone. Where
            everything but the head is frozen, the usual preparation for LoRA, they are adapted. Of ``target_modules``,
            an entry that matches layers of both sorts means those that train.

    Raises:
        InputError: an entry matches nothing (the nearest name is suggested) or a layer that cannot be adapted (an
            nn.Embedding, a grouped convolution; says why), or nothing is left to adapt.
    """
    linear, training = linear_layers(module), training_layers(module)
    modules = [n for n, _ in module.named_modules() if n]
    excluded = set() if exclude is None else set(select(list(adaptable_layers(module)), exclude, "exclude", modules))
    output = _find_output(module, linear, training)
    if any(_in_excluded_network(n, linear, excluded) for n in output):
        of_others = ({n: m for n, m in layers.items() if n not in excluded} for layers in (linear, training))
        output = _find_output(module, *of_others)
    heads = output if head == "auto" else find_head(module, head)
    if target_modules is None or target_modules == "all-linear":
        targets = [n for n in linear if not is_below(n, heads)]
        others_train = any(not is_below(n, [*heads, *output]) for n in training)
        left = [n for n in targets if others_train and n not in training]
    else:
        targets, left = _select_targets(module, target_modules, training)
        heads = [h for h in heads if h not in targets or h in left]
    left = [] if adapt_frozen else [n for n in left if n not in excluded]
    targets = [n for n in targets if n not in excluded and n not in left]
    for name in targets:
        _refuse(name, refusal(module.get_submodule(name)))
    if not targets:
        text = _nothing_to_adapt(module, heads, left, list(training), head == "auto")
        raise InputError(text, setting="target_modules")
    return Choice(targets, heads, left)


def _in_excluded_network(head: str, linear: Iterable[str], excluded: set[str]) -> bool:
    """Whether a head was excluded together with the network it belongs to, as in ``exclude="teacher"``."""
    parent = (_customary_part(head) or head).rpartition(".")[0]
    return bool(parent) and all(n in excluded for n in linear if is_below(n, [parent]))


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Whether ``name`` is one of ``modules``, or inside one."""
    return any(name == m or name.startswith(f"{m}.") for m in modules)


def _nothing_to_adapt(
    module: nn.Module, heads: list[str], left: list[str], training: list[str], head_was_found: bool
) -> str:
    layers = linear_layers(module)
    possible = [n for n, m in adaptable_layers(module).items() if n not in layers and refusal(m) is None]
    example = f", such as {possible[0]!r}" if possible else ""
    text = f"{type(module).__name__} has no layer to adapt: "
    if left:
        return text + (
            f"{len(left)} linear layers are frozen ({summarised(left, layers)}) while others train "
            f"({summarised(training, training)}); adapt_frozen=True gives the frozen ones adapters, target_modules "
            f"names other layers{example}" + (", head= what is to train in full" if head_was_found else "")
        )
    text += f"{len(layers)} nn.Linear in all, output head {heads}; name layers with target_modules{example}"
    text += ", or the head with head=" if head_was_found else ""
    kinds = unsupported_kinds(module)
    return f"{text}; {kinds}" if kinds else text


def summarised(names: Sequence[str], among: Iterable[str]) -> str:
    """Layers by the outermost modules that hold no others of ``among``: at most three of them, and how many more."""
    others = [n for n in among if n not in set(names)]
    shown: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        holders = (".".join(parts[:i]) for i in range(1, len(parts)))
        shown[next((h for h in holders if not any(is_below(n, [h]) for n in others)), name)] = None
    first = list(shown)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def _select_targets(
    module: nn.Module, patterns: str | Iterable[str], training: Mapping[str, nn.Module]
) -> tuple[list[str], list[str]]:
    """The layers that the patterns mean, and those of them that are frozen while others of the same pattern train."""
    names = list(adaptable_layers(module))
    linear = list(linear_layers(module))
    others = [n for n in names if n not in set(linear)]
    is_regex = isinstance(patterns, str)
    keep: set[str] = set()
    left: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = _matches(linear, pattern, is_regex) or _matches(others, pattern, is_regex)
        hits = hits or _inside(linear, pattern, is_regex) or _inside(others, pattern, is_regex)
        hits += _inside(linear, pattern, is_regex=False, whole=True)
        if pattern in others:
            hits.append(pattern)
        if not hits:
            _explain(module, pattern, is_regex)
            raise InputError(f"target_modules: {unknown_layer(pattern, names)}", setting="target_modules")
        if any(n in training for n in hits):
            keep.update(n for n in hits if n in training or n == pattern)
            left.update(n for n in hits if n not in keep)
        else:
            keep.update(hits)
            left.difference_update(hits)
    left -= keep
    return [n for n in names if n in keep | left], [n for n in names if n in left]


def _explain(module: nn.Module, pattern: str, is_regex: bool) -> None:
    """Raise if what the pattern matches cannot be adapted."""
    silent = _silent(module)
    for name in _matches([n for n, _ in module.named_modules() if n], pattern, is_regex):
        for inner, layer in module.get_submodule(name).named_modules(prefix=name):
            reason = OUT_PROJECTION_IS_SILENT if id(layer) in silent else unsupported(layer) or refusal(layer)
            _refuse(inner, reason)


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise InputError(f"target_modules: {name!r} cannot be adapted: {reason}", setting="target_modules")


def select(
    names: Sequence[str], patterns: str | Iterable[str], argument: str, modules: Sequence[str] = ()
) -> list[str]:
    """Those of ``names`` that match ``patterns`` (see :func:`choose_layers`), in their order.

    Args:
        names: of layers.
        patterns: what to look for.
        argument: whose patterns they are; "exclude" means everything below each module that a pattern names.
        modules: names of all modules; a pattern that matches one of them, but none of ``names``, is no mistake.

    Raises:
        InputError: a pattern matches none of them; names the argument, the pattern and the nearest name.
    """
    is_regex = isinstance(patterns, str)
    keep: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = _matches(names, pattern, is_regex)
        # a number is the name of too many modules to mean all of them
        everywhere = not hits or (argument == "exclude" and not pattern.isdigit())
        hits += _inside(names, pattern, is_regex, whole=not everywhere)
        if not hits and not _matches(modules, pattern, is_regex):
            raise InputError(f"{argument}: {unknown_layer(pattern, names)}", setting=argument)
        keep.update(hits)
    return [n for n in names if n in keep]


def _matches(names: Sequence[str], pattern: str, is_regex: bool) -> list[str]:
    if is_regex:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise InputError(f"{pattern!r} is no regular expression ({error}); give names in a list") from error
        hits = [n for n in names if expression.fullmatch(n) or n == pattern]
        if hits or not re.fullmatch(r"[\w.]+", pattern):
            return hits
    return [n for n in names if n == pattern or n.endswith(f".{pattern}")]


def _inside(names: Sequence[str], pattern: str, is_regex: bool, whole: bool = False) -> list[str]:
    """Those of ``names`` below a module that matches ``pattern``, or with ``whole`` has it as its whole name."""
    parts = (name.split(".") for name in names)
    holders = list(dict.fromkeys(".".join(p[:i]) for p in parts for i in range(1, len(p))))
    found = [pattern] if whole else _matches(holders, pattern, is_regex)
    return [n for n in names if n not in found and is_below(n, found)]


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


def _customary_part(name: str) -> str | None:
    """The outermost module with a customary name that ``name`` is, or is in."""
    parts = name.split(".")
    return next((n for i in range(len(parts)) if _customary(n := ".".join(parts[: i + 1]))), None)


def _parallel(layers: Sequence[nn.Module]) -> bool:
    """Whether these are linear layers of one input width, of which none can be the input of another."""
    if not all(is_linear(m) and hasattr(m, "in_features") for m in layers):
        return False
    inputs = {m.in_features for m in layers}
    return len(inputs) == 1 and not inputs & {m.out_features for m in layers}


def _outside_blocks(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _modules_of(value: object) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return list(value.modules())
    if isinstance(value, (list, tuple)):
        return [m for v in value for m in _modules_of(v)]
    return []
