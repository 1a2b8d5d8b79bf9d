"""Which layers of a plain module get an adapter, and which one is its output head."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

HEAD_NAMES = frozenset(
    {"head", "heads", "classifier", "score", "lm_head", "fc", "fc_out", "out", "output", "output_layer", "predictor"}
)
"""Last parts of the names under which model libraries keep their output layer."""


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear of ``module`` that is called as a layer, by name.

    ``nn.MultiheadAttention`` reads the weight of its ``out_proj`` without calling it: an adapter there would never run.
    """
    silent = {id(m.out_proj) for m in module.modules() if isinstance(m, nn.MultiheadAttention)}
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and id(m) not in silent}


def find_head(module: nn.Module, head: str | Sequence[str] | None = "auto") -> list[str]:
    """The names of the output layers, which train in full and get no adapter.

    "auto" asks the model (timm's ``get_classifier``, transformers' ``get_output_embeddings``), then looks for an
    nn.Linear outside repeated blocks with a customary name (``HEAD_NAMES``), then takes the last nn.Linear defined.

    Raises:
        ValueError: a name given is not in the module.
    """
    if head is None:
        return []
    if head != "auto":
        names = [head] if isinstance(head, str) else list(head)
        known = [n for n, _ in module.named_modules() if n]
        for name in names:
            if name not in known:
                raise ValueError(f"head: the module has no layer {name!r}{nearest(name, known)}")
        return names
    layers = linear_layers(module)
    by_id = {id(m): n for n, m in layers.items()}
    for accessor in ("get_classifier", "get_output_embeddings"):
        for m in module.modules():
            out = getattr(m, accessor, None)
            if callable(out):
                found = [by_id[id(x)] for x in _modules_of(out()) if id(x) in by_id]
                if found:
                    return found
    named = [n for n in layers if _customary(n)]
    return [named[-1]] if named else list(layers)[-1:]


def find_targets(
    module: nn.Module,
    target_modules: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    head: str | Sequence[str] | None = "auto",
) -> tuple[list[str], list[str]]:
    """Names of the layers to adapt and of the head.

    Args:
        module: a module without adapters.
        target_modules: which nn.Linear layers to adapt; ``None`` means all but the head. Names match as in PEFT: an
            entry of a list matches a whole name or its last dotted parts, a string is a regular expression for the
            whole name.
        exclude: layers to leave alone, matched the same way, from whatever ``target_modules`` gives.
        head: see :func:`find_head`.

    Raises:
        ValueError: an entry matches nothing (the nearest name is suggested), or nothing is left to adapt.
    """
    layers = list(linear_layers(module))
    heads = find_head(module, head)
    if target_modules is None or target_modules == "all-linear":
        targets = [n for n in layers if not any(n == h or n.startswith(f"{h}.") for h in heads)]
    else:
        targets = select(layers, target_modules, "target_modules")
        heads = [h for h in heads if h not in targets]
    if exclude is not None:
        dropped = set(select(layers, exclude, "exclude"))
        targets = [n for n in targets if n not in dropped]
    if not targets:
        raise ValueError(
            f"{type(module).__name__} has no layer to adapt: {len(layers)} nn.Linear in all, output head {heads}; name "
            "the layers with target_modules= or the head with head="
        )
    return targets, heads


def select(names: Sequence[str], patterns: str | Iterable[str], argument: str) -> list[str]:
    """Those of ``names`` that match ``patterns`` (see :func:`find_targets`), in their order.

    Raises:
        ValueError: a pattern matches none of them; names the argument, the pattern and the nearest name.
    """
    if isinstance(patterns, str):
        chosen = [n for n in names if re.fullmatch(patterns, n) or n == patterns]
        if not chosen and re.fullmatch(r"[\w.]+", patterns):
            chosen = [n for n in names if n.endswith(f".{patterns}")]
        if not chosen:
            raise ValueError(f"{argument}: no layer matches {patterns!r}{nearest(patterns, names)}")
        return chosen
    keep: set[str] = set()
    for pattern in patterns:
        hits = [n for n in names if n == pattern or n.endswith(f".{pattern}")]
        if not hits:
            raise ValueError(f"{argument}: no layer matches {pattern!r}{nearest(pattern, names)}")
        keep.update(hits)
    return [n for n in names if n in keep]


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known`` (whole names or last parts), or an empty string."""
    candidates = {part for k in known for part in (k, k.rsplit(".", 1)[-1], ".".join(k.split(".")[-2:]))}
    match = difflib.get_close_matches(name, sorted(candidates), n=1, cutoff=0.4)
    return f"; did you mean {match[0]!r}?" if match else ""


def _customary(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in HEAD_NAMES and not any(p.isdigit() for p in parts)


def _modules_of(value: object) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return list(value.modules())
    if isinstance(value, (list, tuple)):
        return [m for v in value for m in _modules_of(v)]
    return []
