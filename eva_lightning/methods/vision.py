"""The fine-tuning methods for images: :mod:`eva_lightning.methods.apply` with an ImageClassifier's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L

from eva_lightning.errors import InputError, unknown
from eva_lightning.methods import apply as methods
from eva_lightning.methods.apply import AdapterCheckpoints, AdapterOptions
from eva_lightning.methods.keys import METHOD_TRAITS, MethodKey, eva_state_kind
from eva_lightning.vision.module import ImageClassifier

__all__ = [
    "FFT_LAYER_DECAY", "METHODS", "AdapterCheckpoints", "AdapterOptions", "MethodKey", "apply_method", "eva_state_kind",
]  # fmt: skip

#: Layer-wise learning-rate decay of full fine-tuning (EVA paper, section D.2).
FFT_LAYER_DECAY = 0.75

Prepare = Callable[[ImageClassifier, AdapterOptions], list[L.Callback]]


def _linear(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    module.train_only_head()
    return []


def _fft(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    module.layer_decay = FFT_LAYER_DECAY
    return []


def _shared(method: str, **fixed: Any) -> Prepare:
    """A method of :mod:`eva_lightning.methods.apply`, with options that are not the user's to choose."""

    def prepare(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
        return methods.apply_method(method, module, replace(options, **fixed), head=module.head_name)

    return prepare


METHODS: dict[str, Prepare] = {
    "linear": _linear,
    "fft": _fft,
    **{method: _shared(method) for method in METHOD_TRAITS if method in methods.METHODS and method != "fft"},
    "eva-whiten": _shared("eva", init="whiten"),
    "eva-rotate": _shared("eva", init="rotate"),
    "eva-permute": _shared("eva", init="permute"),
    # uniform ranks: that a component explains least says nothing of where rank is needed (paper, Table 12)
    "eva-minor": _shared("eva", init="minor", rho=1.0),
    "lora-redistribute": _shared("eva", init="redistribute"),
}
"""How every method prepares a module; :data:`eva_lightning.methods.keys.METHOD_TRAITS` says what each needs."""


def apply_method(method: str, module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    """Prepare `module` for `method` and return the callbacks to train with.

    ``"linear"`` trains the head alone, ``"fft"`` everything with layer-wise learning-rate decay 0.75. The others train
    adapters, head and biases: see :func:`eva_lightning.methods.apply.apply_method`. ``"eva-whiten"``, ``"eva-rotate"``,
    ``"eva-permute"``, ``"eva-minor"`` and ``"lora-redistribute"`` are EVA with another ``init``.

    Raises:
        InputError: Unknown method (names the nearest), or options that contradict it.
    """
    if method not in METHODS:
        raise InputError(unknown("method", method, METHODS))
    if options.state is not None and eva_state_kind(method) is None:
        raise InputError(f"{method} starts from no EVA state, but one is given: {options.state}")
    if options.init != "eva" and method not in ("eva", "eva-dora") and eva_state_kind(method) is not None:
        raise InputError(f"{method} has an initialisation of its own: leave init={options.init!r} to eva and eva-dora")
    return METHODS[method](module, options)
