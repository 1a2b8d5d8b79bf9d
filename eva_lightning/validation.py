"""Checks of the callback's arguments: one sentence with the name, the expectation and the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from eva_lightning.adapters.targets import nearest
from eva_lightning.errors import InputError, InputTypeError
from eva_lightning.initialization import INITS
from eva_lightning.ranks import METRICS

ENGINES = ("auto", "exact", "incremental", "sketch")
STOPPING = ("auto", "captured", "cosine")
BIASES = ("none", "all", "lora_only")


def check_options(**options: Any) -> None:
    """Raise ValueError or TypeError for the first option of EVAInitCallback that is out of range."""
    o = options
    _number("rho", o["rho"], "a number of at least 1", lambda v: v >= 1)
    _integer("r", o["r"], 1)
    _number("alpha", o["alpha"], "a number above 0", lambda v: v > 0)
    _number("lora_dropout", o["lora_dropout"], "in [0, 1)", lambda v: 0 <= v < 1)
    _number("tau", o["tau"], "in (0, 1]", lambda v: 0 < v <= 1)
    _number("delta", o["delta"], "in (0, 1]", lambda v: 0 < v <= 1)
    _integer("max_batches", o["max_batches"], 1)
    _integer("memory_budget", o["memory_budget"], 1)
    if o["tokens_per_sample"] not in (None, "auto"):
        _integer("tokens_per_sample", o["tokens_per_sample"], 1)
    _choice("engine", o["engine"], ENGINES)
    _choice("stopping", o["stopping"], STOPPING)
    _choice("metric", o["metric"], METRICS)
    _choice("init", o["init"], INITS)
    _choice("bias", o["bias"], BIASES)
    for name in ("forward_fn", "mask_fn"):
        if o[name] is not None and not callable(o[name]):
            raise InputTypeError(f"{name} must be a function or None, got {o[name]!r}")
    if o["init"] == "minor" and o["engine"] in ("incremental", "sketch"):
        raise InputError(
            f"init='minor' needs the whole spectrum, which engine={o['engine']!r} does not keep; use 'exact'"
        )


def _number(name: str, value: Any, expected: str, test: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputTypeError(f"{name} must be {expected}, got {value!r}")
    if not math.isfinite(value) or not test(value):
        raise InputError(f"{name} must be {expected}, got {value!r}")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{nearest(str(value), allowed)}")
