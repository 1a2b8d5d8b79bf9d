"""Which linear layers compute an attention's queries, keys and values, by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from torch import nn

from eva_lightning.adapters.supported_layers import is_linear
from eva_lightning.errors import InputError

Role = Literal["query", "key", "value"]

_PREFIX, _SUFFIX = r"(?:to_?|w_?|in_proj_|c_)?", r"(?:_?(?:proj|projection|lin|linear|layer|fc|attn))?"
# q, q_proj, query, to_q, wq, q_lin, q_attn, ... and the same of k and v
_PART = re.compile(rf"{_PREFIX}(q|query|queries|k|key|keys|v|value|values){_SUFFIX}", re.IGNORECASE)
# qkv, kv, Wqkv, to_kv, query_key_value, GPT-2's c_attn, ...
_FUSED = re.compile(rf"{_PREFIX}(?:qkv|kv|qk|query_key_value|key_value){_SUFFIX}|c_attn", re.IGNORECASE)
_ROLES: dict[str, Role] = {"q": "query", "k": "key", "v": "value"}


def attention_role(name: str) -> Role | None:
    """What the layer called `name` computes for an attention, judged by the last part of its name alone.

    The names are those of timm, transformers, diffusers and of what
    :func:`eva_lightning.vision.backbone.split_fused.split_fused` makes (``qkv.q``).
    """
    found = _PART.fullmatch(name.rpartition(".")[2])
    return _ROLES[found[1][0].lower()] if found else None


def queries_and_values(module: nn.Module, candidates: Iterable[str], method: str) -> list[str]:
    """Those of the linear layers `candidates` that compute queries or values, in their order.

    A layer counts where its attention (the module that holds it) has both among `candidates`: a layer ``value`` that
    stands alone, as in an actor-critic network, is no attention's.

    Raises:
        InputError: A candidate computes several of them at once, or none is named like them; names `method`.
    """
    names = list(candidates)
    fused = [n for n in names if _FUSED.fullmatch(n.rpartition(".")[2]) and is_linear(module.get_submodule(n))]
    if fused:
        more = f" and {len(fused) - 1} more" if len(fused) > 1 else ""
        raise InputError(
            f"{method} adapts queries and values in different ways, but {fused[0]!r}{more} compute them together: take "
            "them apart first (--split-fused, or eva_lightning.vision.backbone.split_fused)"
        )
    roles: dict[str, set[Role]] = defaultdict(set)
    by_layer = {name: role for name in names if (role := attention_role(name))}
    for name, role in by_layer.items():
        roles[_attention_of(name)].add(role)
    chosen = [n for n, role in by_layer.items() if role != "key" and roles[_attention_of(n)] >= {"query", "value"}]
    if not chosen:
        packed = any(isinstance(m, nn.MultiheadAttention) for m in module.modules())
        raise InputError(
            f"{method} adapts an attention's queries and values, but {type(module).__name__} has no two layers to "
            "adapt that are named like them (q and v, q_proj and v_proj, query and value, ...) in one module"
            + (": nn.MultiheadAttention keeps them in one weight" if packed else "")
        )
    return chosen


def _attention_of(name: str) -> str:
    """The module that a query, key or value belongs to: ``attn`` for ``attn.q``, ``attn.qkv.q`` and ``attn.kv.v``."""
    holder = name.rpartition(".")[0]
    outer, _, last = holder.rpartition(".")
    return outer if _FUSED.fullmatch(last) else holder
