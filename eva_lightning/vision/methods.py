"""The fine-tuning methods for images: those of :mod:`eva_lightning.methods` with an ImageClassifier's settings."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L

from eva_lightning import methods
from eva_lightning._suggest import unknown
from eva_lightning.methods import AdapterCheckpoints, AdapterOptions

from .module import ImageClassifier

__all__ = ["FFT_LAYER_DECAY", "METHODS", "AdapterCheckpoints", "AdapterOptions", "apply_method"]

#: Layer-wise learning-rate decay of full fine-tuning (EVA paper, section D.2).
FFT_LAYER_DECAY = 0.75

Prepare = Callable[[ImageClassifier, AdapterOptions], list[L.Callback]]


def _linear(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    module.train_only_head()
    return []


def _fft(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    module.layer_decay = FFT_LAYER_DECAY
    return []


def _shared(method: str) -> Prepare:
    def prepare(module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
        return methods.apply_method(method, module, options, head=module.head_name)

    return prepare


METHODS: dict[str, Prepare] = {
    "linear": _linear,
    "fft": _fft,
    **{method: _shared(method) for method in ("lora", "dora", "eva", "eva-dora")},
}


def apply_method(method: str, module: ImageClassifier, options: AdapterOptions) -> list[L.Callback]:
    """Prepare `module` for `method` and return the callbacks to train with.

    ``"linear"`` trains the head alone, ``"fft"`` everything with layer-wise learning-rate decay 0.75; ``"lora"`` and
    ``"dora"`` inject adapters at once, ``"eva"`` and ``"eva-dora"`` leave that to the callback at the start of ``fit``.

    Raises:
        ValueError: Unknown method; names the nearest.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    return METHODS[method](module, options)
